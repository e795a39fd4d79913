rule stage2:
    """The model is fine-tuned with the variant's attention in place, router frozen, hard block choice, quantised where the row says so."""
    input:
        base=rules.base_model.output.base,
        adapter=stage1_adapter,
    output:
        adapter="<results>/stage2/{variant}/seed{seed}/adapter.safetensors",
        config="<results>/stage2/{variant}/seed{seed}/adapter.json",
        log="<results>/stage2/{variant}/seed{seed}/log.csv",
    log:
        "<logs>/stage2/{variant}-seed{seed}.log",
    conda:
        "../envs/sla2.yaml"
    threads: study.config["threads"]
    # Not parameters: another number of GPUs reruns nothing.
    resources:
        gpu=gpus("stage2"),
        nodes=study.config["stage2"]["nodes"],
    params:
        settings=lambda w: settings(
            "stage2",
            variant=ROWS[w.variant],
            train_seed=int(w.seed),
            attention=ATTENTION,
            video=VIDEO,
        ),
        adapter=lambda w, input: folder_option("--adapter", input.adapter),
        output=subpath(output.adapter, parent=True),
    shell:
        "( sla2 --gpus {resources.gpu} --nodes {resources.nodes} stage2 --settings {params.settings:q} --base {input.base} {params.adapter} --output {params.output} )"
        " 2>&1 | tee {log}"
