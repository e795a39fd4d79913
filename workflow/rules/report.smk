localrules:
    tables,
    figure,
    contact_sheet,
    notebook,
    report,


rule tables:
    """Records become tidy tables: mean, interval and count; everything after this reads tables, never models."""
    input:
        base=rules.base_model.output.base,
        scores=[f"<results>/score/{name}.csv" for name in ROWS],
        # What VBench itself measured, by `sla2-eval vbench-import`.
        imported=sorted(map(str, Path(f"results/{study.config['study']}/vbench").glob("*.csv"))),
        latency=rules.latency.output,
        validity=rules.validity.output,
        training=[
            rules.base_model.output.log,
            expand(rules.stage1.output.log, group=GROUPS),
            [f"<results>/stage2/{name}/seed{seed}/log.csv" for name, seed in RUNS if study.variants[name].finetune],
        ],
        routers=expand(rules.stage1.output.report, group=GROUPS),
    output:
        report(TABLES, caption="../report/tables.rst", category="Tables"),
    log:
        "<logs>/report/tables.log",
    conda:
        "../envs/sla2.yaml"
    params:
        settings=settings("report", variants=list(ROWS.values())),
        output=subpath(output[0], parent=True),
    shell:
        "( sla2 tables --settings {params.settings:q} --base {input.base} --scores {input.scores} {input.imported}"
        " --latency {input.latency} --validity {input.validity} --training {input.training}"
        " --routers {input.routers} --output {params.output} ) 2>&1 | tee {log}"


rule figure:
    """A figure reads tables and needs neither GPU nor model."""
    input:
        tables=TABLES,
        script="workflow/scripts/{figure}.py",
    output:
        report(
            "<results>/figures/{figure}.svg",
            caption="../report/figure.rst",
            category="Figures",
        ),
        "<results>/figures/{figure}.png",
    log:
        "<logs>/report/{figure}.log",
    conda:
        "../envs/sla2.yaml"
    params:
        caption=lambda w: CAPTIONS[w.figure],
        tables=subpath(input[0], parent=True),
        output=subpath(output[0], strip_suffix=".svg"),
    shell:
        "( python {input.script} --tables {params.tables} --output {params.output} ) 2>&1 | tee {log}"


rule contact_sheet:
    """Frames of every variant for the same prompts, seeds and noise, side by side."""
    input:
        tables=TABLES,
        script="workflow/scripts/contact_sheet.py",
        videos=[f"<results>/generate/{name}/seed0/manifest.jsonl" for name in ROWS],
    output:
        report(
            "<results>/figures/contact_sheet.svg",
            caption="../report/figure.rst",
            category="Figures",
        ),
        "<results>/figures/contact_sheet.png",
    log:
        "<logs>/report/contact_sheet.log",
    conda:
        "../envs/sla2.yaml"
    params:
        caption=CAPTIONS["contact_sheet"],
        tables=subpath(input[0], parent=True),
        videos=lambda w, input: Path(input.videos[0]).parents[2],
        output=subpath(output[0], strip_suffix=".svg"),
    shell:
        "( python {input.script} --tables {params.tables} --videos {params.videos} --output {params.output} ) 2>&1 | tee {log}"


rule notebook:
    """A notebook is committed without outputs and executed here."""
    input:
        tables=TABLES,
        notebook="notebooks/{notebook}.ipynb",
    output:
        report(
            "<results>/notebooks/{notebook}.ipynb",
            caption="../report/notebooks.rst",
            category="Notebooks",
        ),
    log:
        "<logs>/report/{notebook}.log",
    conda:
        "../envs/sla2.yaml"
    params:
        results=lambda w, input: os.path.relpath(Path(input.tables[0]).parents[1], "notebooks"),
    shell:
        "( python -m papermill {input.notebook} {output} --cwd notebooks --parameters results {params.results}"
        " --kernel python3 --no-progress-bar --log-output ) 2>&1 | tee {log}"


rule report:
    """One page with tables, figures and playing videos, which opens from disk."""
    input:
        tables=TABLES,
        figures=FIGURES,
        videos=[manifests(name) for name in ROWS],
        # Speeds that a GPU machine measured; the paper's are compared with them.
        reference=sorted(map(str, Path("results/reference").glob("*/summary.csv"))),
    output:
        report(
            directory("<results>/report"),
            htmlindex="index.html",
            caption="../report/page.rst",
            category="Report",
        ),
    log:
        "<logs>/report/report.log",
    conda:
        "../envs/sla2.yaml"
    params:
        tables=subpath(input[0], parent=True),
        figures=lambda w, input: Path(input.figures[0]).parent,
        videos=lambda w, input: Path(input.videos[0]).parents[2],
        reference=lambda w, input: f"--reference {' '.join(input.reference)}" if input.reference else "",
    shell:
        "( sla2 report --tables {params.tables} --figures {params.figures} --videos {params.videos}"
        " {params.reference}"
        " --output {output} ) 2>&1 | tee {log}"
