rule generate:
    """Each variant samples the same prompts from the same seeds and the same initial noise."""
    input:
        base=rules.base_model.output.base,
        adapter=lambda w: trained_adapters(w.variant, [w.seed]),
        prompts=study.config["prompts"],
    output:
        manifest="<results>/generate/{variant}/seed{seed}/manifest.jsonl",
    log:
        "<logs>/generate/{variant}-seed{seed}.log",
    conda:
        "../envs/sla2.yaml"
    threads: study.config["threads"]
    resources:
        gpu=gpus("generate"),
    params:
        settings=lambda w: settings(
            "generate",
            variant=ROWS[w.variant],
            train_seed=int(w.seed),
            attention=ATTENTION,
            video=VIDEO,
        ),
        trained=lambda w, input: folder_option("--trained", input.adapter),
        output=subpath(output.manifest, parent=True),
    shell:
        "( sla2 generate --settings {params.settings:q} --base {input.base} {params.trained}"
        " --prompts {input.prompts} --output {params.output} ) 2>&1 | tee {log}"
