rule stage1:
    """Router and mixing are fitted to the dense attention's output, the base model frozen; rows that agree in both share a run."""
    input:
        base=rules.base_model.output.base,
    output:
        adapter="<results>/stage1/{group}/adapter.safetensors",
        config="<results>/stage1/{group}/adapter.json",
        log="<results>/stage1/{group}/log.csv",
        report="<results>/stage1/{group}/report.csv",
    log:
        "<logs>/stage1/{group}.log",
    conda:
        "../envs/sla2.yaml"
    threads: study.config["threads"]
    resources:
        gpu=gpus("stage1"),
    params:
        settings=lambda w: settings("stage1", variant=group_row(w.group), attention=ATTENTION, video=VIDEO),
        output=subpath(output.adapter, parent=True),
    shell:
        "( sla2 stage1 --settings {params.settings:q} --base {input.base} --output {params.output} )"
        " 2>&1 | tee {log}"
