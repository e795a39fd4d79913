rule latency:
    """Attention and denoising step are timed for all variants in one process, which takes every core, once nothing else is left to run."""
    input:
        base=rules.base_model.output.base,
        # The rows are in the settings, so that a comment in the sheet, or a row that is not of this study, reruns nothing.
        sheet=ancient(study.config["variants"]["sheet"]),
    output:
        "<results>/latency/latency.csv",
    log:
        "<logs>/latency.log",
    # Last of all and beside nothing: every other job comes first, and it takes every core.
    priority: -1
    conda:
        "../envs/sla2.yaml"
    threads: EVERY_CORE
    resources:
        gpu=gpus("latency"),
    params:
        settings=settings(
            "latency",
            attention=ATTENTION,
            variants=list(ROWS.values()),
            steps=study.config["generate"]["steps"],
            guidance=study.config["generate"]["guidance"],
        ),
    shell:
        "( sla2 latency --settings {params.settings:q} --base {input.base} --variants {input.sheet} --output {output} )"
        " 2>&1 | tee {log}"
