# The method in one page: one word per step, the same word for the config section, the rule file, the module and the results.
#
#   snakemake ablations                                    the tiny study, on a CPU, in minutes
#   snakemake ablations --configfile config/mini.yaml      another study
#   snakemake all_stage2                                   one step of every variant: all_stage1, all_stage2, all_generate, all_score
#   snakemake latency                                      a step that has one job: data, base_model, latency, tables, report

from snakemake.utils import min_version

min_version("9.27")

if not workflow.overwrite_configfiles:

    configfile: "config/tiny.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"


localrules:
    ablations,
    figures,


rule ablations:
    default_target: True
    input:
        TABLES,
        FIGURES,
        NOTEBOOKS,
        "<results>/report",


rule figures:
    input:
        FIGURES,


for step, outputs in EVERY.items():

    rule:
        name:
            f"all_{step}"
        input:
            outputs,


include: "workflow/rules/data.smk"
include: "workflow/rules/base_model.smk"
include: "workflow/rules/stage1.smk"
include: "workflow/rules/stage2.smk"
include: "workflow/rules/generate.smk"
include: "workflow/rules/score.smk"
include: "workflow/rules/latency.smk"
include: "workflow/rules/report.smk"
