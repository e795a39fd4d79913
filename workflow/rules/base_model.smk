rule base_model:
    """The dense Wan model that all variants start from, given or trained, and its cached latents and text embeddings."""
    input:
        data=rules.data.output.summary,
    output:
        base="<results>/base_model/base_model.json",
        log="<results>/base_model/log.csv",
    log:
        "<logs>/base_model.log",
    conda:
        "../envs/sla2.yaml"
    threads: study.section("base_model")["threads"]
    # Not a parameter: another number of GPUs reruns nothing.
    resources:
        gpu=gpus("base_model"),
    params:
        settings=settings("base_model", video=VIDEO),
        data=subpath(input.data, parent=True),
        output=subpath(output.base, parent=True),
    shell:
        "( sla2 --gpus {resources.gpu} base_model --settings {params.settings:q} --data {params.data} --output {params.output} )"
        " 2>&1 | tee {log}"
