rule data:
    """Captioned clips: procedural scenes, or a folder of videos, split into train, held-out and the judge's own."""
    input:
        captions(),
    output:
        clips=expand(
            "<results>/data/{split}.jsonl",
            split=["train", "heldout", "judge", "judge_heldout"],
        ),
        summary="<results>/data/data.json",
    log:
        "<logs>/data.log",
    conda:
        "../envs/sla2.yaml"
    threads: study.config["threads"]
    params:
        settings=settings("data", withheld=study.withheld),
        output=subpath(output.summary, parent=True),
    shell:
        "( sla2 data --settings {params.settings:q} --output {params.output} ) 2>&1 | tee {log}"
