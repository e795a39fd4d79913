rule judge:
    """An open_clip learns, on clips that nothing else sees, to read colour, shape and direction off a video; NIQE is fitted beside it."""
    input:
        data=rules.data.output.summary,
    output:
        directory("<results>/score/judge"),
    log:
        "<logs>/score/judge.log",
    conda:
        "../envs/sla2.yaml"
    threads: study.config["threads"]
    resources:
        gpu=gpus("score"),
    params:
        settings=settings("score.judge", video=VIDEO, **NATURALNESS),
        data=subpath(input.data, parent=True),
    shell:
        "( sla2 judge --settings {params.settings:q} --data {params.data} --output {output} )" " 2>&1 | tee {log}"


rule validity:
    """Known damage in known strengths shows what each metric sees, on the study's own kind of clip and on filmed ones."""
    input:
        data=rules.data.output.summary,
        judge=rules.judge.output,
    output:
        "<results>/score/validity.csv",
    log:
        "<logs>/score/validity.log",
    conda:
        "../envs/sla2.yaml"
    threads: study.config["threads"]
    resources:
        gpu=gpus("score"),
    params:
        settings=settings("score.validity", video=VIDEO, naturalness_patch=study.config["score"]["naturalness_patch"]),
        data=subpath(input.data, parent=True),
    shell:
        "( sla2 validity --settings {params.settings:q} --judge {input.judge} --data {params.data} --output {output} )"
        " 2>&1 | tee {log}"


rule score:
    """Quality, fidelity to the untouched base model's videos of the same noise, and attention error of one variant."""
    input:
        base=rules.base_model.output.base,
        videos=lambda w: manifests(w.variant),
        reference=manifests(BASE),
        adapters=lambda w: trained_adapters(w.variant, study.training_seeds(w.variant)),
        judge=rules.judge.output,
        prompts=study.config["prompts"],
    output:
        "<results>/score/{variant}.csv",
    log:
        "<logs>/score/{variant}.log",
    conda:
        "../envs/sla2.yaml"
    threads: study.section("score")["threads"]
    resources:
        gpu=gpus("score"),
    params:
        settings=lambda w: settings("score", variant=ROWS[w.variant], attention=ATTENTION, video=VIDEO),
        videos=lambda w, input: folders(input.videos),
        reference=lambda w, input: folders(input.reference),
        trained=lambda w, input: folder_option("--trained", input.adapters),
    shell:
        "( sla2 score --settings {params.settings:q} --base {input.base}"
        " --videos {params.videos} --reference {params.reference} {params.trained} --judge {input.judge}"
        " --prompts {input.prompts} --output {output} ) 2>&1 | tee {log}"
