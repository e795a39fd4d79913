"""What stands under each figure, on the page and in Snakemake's report. Standard library only, as the Snakefile reads it."""

CAPTIONS = {
    "quality_sparsity": "Headline metrics against the sparsity that was realised. Lines join rows that differ in sparsity only; "
    "horizontal lines with plain bands are the dense rows. Noise floors, dense attention run once more: hatched, how far other seeds alone "
    "move the dense mean; dotted, the distance of dense videos of another seed; dash-dotted, of another dense kernel. Bars and bands are intervals of the mean; a marker without a bar has no "
    "interval. Rows of one sparsity stand side by side, a few per cent of the kept share apart.",
    "ablation_bars": "One part of the method changed at a time, all at the same sparsity. The grey band is the reference, the hatched one "
    "how far other seeds alone move it; a dotted or dash-dotted line is how far dense attention is from itself with another seed or kernel. "
    "Intervals of two rows may overlap although their paired difference is resolved: judge by the fill, or by the next figure.",
    "paired_differences": "Difference to the reference on the same prompts, seeds and initial noise. Filled: the interval leaves "
    "out 0, also after correction for the number of metrics. Half-filled: the whole interval lies inside the margin (shaded) that was "
    "set before the run. Hatched: what other seeds alone would make of two dense runs. Filled below: every pair is identical. Hollow: none of these, so this study does not tell the two apart.",
    "pareto": "Quality against speed. The grey staircase joins rows that no other row beats in both. FLOPs are counted at the "
    "blocks that were kept; speed-ups are measured against dense attention in the same process on the device named above the panel.",
    "attention_error_by_layer": "Each layer's attention against dense attention on the same Q, K and V of held-out clips, so an "
    "error is the attention's own and not the drift of layers before it. The dash-dotted line is dense attention with another kernel.",
    "routers": "What stage 1 chose, beside routers that bound it: the heuristic, a random choice, and the key blocks of largest exact "
    "softmax mass. Held-out clips that did not choose the state; mean over layers and noise levels. Alpha is fitted by least squares "
    "for every router, so that choices are compared and not what was learnt around them; the learned router's trained alpha beside it.",
    "finetuning": "Headline metrics against the steps of fine-tuning, of rows that are the same method; lines join rows that differ in steps "
    "only. Single markers learnt with another loss or trained other weights. Bars are intervals of the mean; the fill compares with the reference. "
    "Rows of equal steps stand a little apart.",
    "training_curves": "What training did. Held-out curves use clips that no training saw; a hard error is that of the operator as "
    "inference runs it, not of its soft relaxation.",
    "what_metrics_see": "Each metric's mean change under known damage, paired clip by clip. A dot: the change is within three standard "
    "errors, so the metric does not see it. A dash: the metric is undefined there. Red: it calls the damage worse, or falls where it has no "
    "direction; blue: it calls the damage better, which a reader must know before trusting a gain.",
    "contact_sheet": "Frames over time. Rows share prompt, seed and initial noise; frames come from the lossless files.",
}
