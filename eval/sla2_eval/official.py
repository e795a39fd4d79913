"""Official metrics that need weights which this harness does not fetch: named, with the file that each one waits for.

They are recorded as not available, one row a variant, so that no table can pass a stand-in off for them.
"""

WEIGHTS = {
    "vbench.imaging_quality": "musiq_spaq_ckpt-358bb6af.pth",
    "vbench.aesthetic_quality": "ViT-L-14.pt and sa_0_4_vit_l_14_linear.pth",
    "vbench.overall_consistency": "ViClip-InternVid-10M-FLT.pth",
    "vbench.motion_smoothness": "amt-s.pth",
    "vbench.subject_consistency": "dino_vitbase16_pretrain.pth",
    "vbench.background_consistency": "ViT-B-32.pt",
    "vbench.dynamic_degree": "raft-things.pth",
    "vision_reward": "THUDM/VisionReward-Video",
}


def unavailable() -> dict[str, str]:
    """Reason by metric."""
    return {
        name: f"not available: needs the weights {weights}, which are not part of this study"
        for name, weights in WEIGHTS.items()
    }
