"""Unit and direction of every metric: one plain table, read by the steps that write records.

The definition of a metric, its range, source and blind spots stand in the docstring of the function that computes it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """Unit of a value and whether a higher one is better (None: neither direction is)."""

    unit: str
    higher_is_better: bool | None


UP, DOWN, NEITHER = True, False, None

METRICS = {
    # Exact, per video.
    "temporal_flickering": Metric("1", UP),
    "temporal_flickering_static": Metric("1", UP),
    "fidelity.psnr": Metric("dB", UP),
    "fidelity.psnr_pooled": Metric("dB", UP),
    "fidelity.ssim": Metric("1", UP),
    # How far the untouched dense model's own videos of one prompt are from each other: what fidelity is read against.
    "floor.psnr": Metric("dB", NEITHER),
    "floor.ssim": Metric("1", NEITHER),
    "floor.attention_rel_l1": Metric("1", NEITHER),  # and how far two dense kernels are
    # Recovered from the frames and compared with the prompt: the headline of synthetic studies.
    "oracle.presence": Metric("1", UP),
    "oracle.color": Metric("1", UP),
    "oracle.shape": Metric("1", UP),
    "oracle.direction": Metric("1", UP),
    "oracle.all": Metric("1", UP),
    "oracle.speed": Metric("1", UP),
    "oracle.velocity_error": Metric("1", DOWN),
    "oracle.count": Metric("1", UP),
    "oracle.count_error": Metric("things", DOWN),
    # Stand-ins with names of their own: never in one column with VBench.
    "proxy.motion_smoothness_dis": Metric("1", UP),
    "proxy.interp_gain": Metric("1", UP),
    "proxy.dynamic_degree_dis": Metric("1", NEITHER),
    "proxy.flow_top5": Metric("px/step", NEITHER),
    "proxy.naturalness_niqe_indomain": Metric("1", DOWN),
    "proxy.text_alignment_clip_indomain": Metric("1", UP),
    "proxy.retrieval_r1_clip_indomain": Metric("1", UP),
    "proxy.frame_consistency_clip_indomain": Metric("1", UP),
    "proxy.kid_indomain": Metric("1", DOWN),  # of a row's videos together
    "judge.color": Metric("1", UP),
    "judge.shape": Metric("1", UP),
    "judge.direction": Metric("1", UP),
    # VBench's and CLIP's own, where their published weights are given.
    "vbench.imaging_quality": Metric("1", UP),
    "vbench.aesthetic_quality": Metric("1", UP),
    "vbench.overall_consistency": Metric("1", UP),
    "vbench.motion_smoothness": Metric("1", UP),
    "vbench.subject_consistency": Metric("1", UP),
    "vbench.background_consistency": Metric("1", UP),
    "vbench.dynamic_degree": Metric("1", NEITHER),
    "vbench.temporal_flickering": Metric("1", UP),
    # The same dimensions as VBench itself measured them on exported mp4 files: other decoding, other records, never one mean with ours.
    "vbench_official.imaging_quality": Metric("1", UP),
    "vbench_official.aesthetic_quality": Metric("1", UP),
    "vbench_official.overall_consistency": Metric("1", UP),
    "vbench_official.motion_smoothness": Metric("1", UP),
    "vbench_official.subject_consistency": Metric("1", UP),
    "vbench_official.background_consistency": Metric("1", UP),
    "vbench_official.dynamic_degree": Metric("1", NEITHER),
    "vbench_official.temporal_flickering": Metric("1", UP),
    "clip_score.vit_b32": Metric("1", UP),
    "clip_score.vit_l14": Metric("1", UP),
    "vision_reward": Metric("1", UP),
    # A flagged video stays in every mean; the share of flags is printed next to it.
    "guard.static": Metric("1", DOWN),
    "guard.blank": Metric("1", DOWN),
    "guard.saturated": Metric("1", DOWN),
    "guard.not_finite": Metric("1", DOWN),
    "guard.size": Metric("1", DOWN),
    # Tensors of one attention layer.
    "attention.rel_l1": Metric("1", DOWN),
    "attention.rmse": Metric("1", DOWN),
    "attention.cosine": Metric("1", UP),
    "attention.kept_mass": Metric("1", UP),
    "attention.alpha_error": Metric("1", DOWN),
    "attention.alpha_mean": Metric("1", NEITHER),
    "sparsity.realised": Metric("1", NEITHER),
}
