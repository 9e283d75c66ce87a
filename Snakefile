# From nothing to the book: prepare -> pretrain -> train -> evaluate -> classical -> tabulate -> notebooks -> stage -> book.
# `make book` calls this file. One more way: snakemake --cores all --config profile=cpu dataset=celeba
import sys
from pathlib import Path

from flowlib.data import data_dir
from flowlib.experiments import FOREIGN_IMAGES, METHODS, TASKS, Experiment

PROFILE = config.get("profile", "demo")
DATASET = config.get("dataset", "synthetic")
EDITION = config.get("edition", "v2")
SEED = config.get("seed", 0)
BUILD = config.get("build", "build")
RETRAIN = int(config.get("retrain", 0))

# What the profile trains for this edition, "task-prox" each.
EXPERIMENT = Experiment(PROFILE, DATASET, EDITION, SEED, BUILD)
TRAININGS = [f"{task}-{prox}" for task, prox in EXPERIMENT.trainings()]
# Where models of this very experiment are kept with the code, the book is made from those alone, and from their records, unless
# retrain=1. `make verify` evaluates them anew.
KEPT = Path("results/checkpoints") / EXPERIMENT.runs.name
RECORDS = Path("results/runs") / EXPERIMENT.runs.name
SHIPPED = [] if RETRAIN else sorted(path.stem for path in (KEPT / EDITION).glob("*.safetensors"))
SHIPPED_FLOWS = [] if RETRAIN else sorted(path.stem for path in KEPT.glob("flow*.safetensors"))
KEPT_CLASSICAL = [] if RETRAIN else sorted(str(path) for path in (RECORDS / EDITION).glob("classical-*.json"))
TRAININGS = SHIPPED or TRAININGS
# Faces out of distribution, where the data set has such a companion.
FOREIGN = FOREIGN_IMAGES.get(DATASET)
if FOREIGN == "anime" and not Path(f"{BUILD}/data/anime").exists() and not any(data_dir().glob("anime*")):
    FOREIGN = None  # the user has CelebA only
NOTEBOOKS = ["01_data", "02_flow", "03_solver", "04_table1", "05_figures", "06_engine", "07_stability", "08_speed"]
NOTEBOOKS += ["09_tables", "10_classical", "11_blur", "12_explorer"]
TABLES = ["table1.csv", "table1_recorded.csv", "provenance.csv", "build.md", "findings.md"]

FLOWS = f"{BUILD}/runs/{PROFILE}-{DATASET}-s{SEED}"
RUN = f"{FLOWS}/{EDITION}"
CHOICE = f"--profile {PROFILE} --dataset {DATASET} --edition {EDITION} --seed {SEED} --build {BUILD}"

# Commands below are those of the Python that runs Snakemake.
shell.prefix(f"set -euo pipefail; export PATH={Path(sys.executable).parent}:$PATH; ")


wildcard_constraints:
    task="|".join(TASKS),
    prox="|".join(METHODS),
    flow="flow|flow-noisy",
    network="unet|resnet",


rule all:
    input:
        expand(f"{RUN}/{{training}}/record.json", training=TRAININGS),
        expand(f"{BUILD}/tables/{{table}}", table=TABLES),
        expand(f"{BUILD}/executed/{{notebook}}.ipynb", notebook=NOTEBOOKS),
        f"{BUILD}/html/.buildinfo",


rule prepare:
    output:
        f"{BUILD}/data/{{dataset}}/images.npy",
        f"{BUILD}/data/{{dataset}}/manifest.json",
    shell:
        f"python -m flowlib prepare {{wildcards.dataset}} --build {BUILD}"


IMAGES = f"{BUILD}/data/{DATASET}/manifest.json"


# A training takes every core (threads: workflow.cores), so trainings run one after another.
rule pretrain:
    input:
        IMAGES,
    output:
        f"{FLOWS}/flow/model.safetensors",
        f"{FLOWS}/flow/record.json",
    threads: workflow.cores
    shell:
        f"python -m flowlib pretrain {CHOICE}"


rule pretrain_noisy:
    input:
        IMAGES,
        f"{FLOWS}/flow/model.safetensors",  # of whichever rule makes it
    output:
        f"{FLOWS}/flow-noisy/model.safetensors",
        f"{FLOWS}/flow-noisy/record.json",
    threads: workflow.cores
    shell:
        f"python -m flowlib pretrain {CHOICE} --noisy"


rule pretrain_denoiser:
    input:
        IMAGES,
    output:
        f"{RUN}/denoiser-{{network}}/model.safetensors",
    threads: workflow.cores
    shell:
        f"python -m flowlib pretrain {CHOICE} --denoiser {{wildcards.network}}"


def start_of(wildcards):
    """What this prox starts from."""
    method = METHODS[wildcards.prox]
    return {
        None: [],
        "flow": f"{FLOWS}/flow/model.safetensors",
        "flow-noisy": f"{FLOWS}/flow-noisy/model.safetensors",
        "denoiser": f"{RUN}/denoiser-{method.network}/model.safetensors",
    }[method.start]


# Kept models come with the records of their evaluation.
rule restore:
    input:
        model=KEPT / EDITION / "{task}-{prox}.safetensors",
        record=RECORDS / EDITION / "{task}-{prox}.json",
    output:
        f"{RUN}/{{task}}-{{prox}}/record.json",
    shell:
        f"cp {{input.model}} {RUN}/{{wildcards.task}}-{{wildcards.prox}}/model.safetensors && cp {{input.record}} {{output}}"


rule restore_flow:
    input:
        model=KEPT / "{flow}.safetensors",
        record=RECORDS / "{flow}.json",
    output:
        model=f"{FLOWS}/{{flow}}/model.safetensors",
        record=f"{FLOWS}/{{flow}}/record.json",
    shell:
        "cp {input.model} {output.model} && cp {input.record} {output.record}"


if SHIPPED:
    ruleorder: restore > train
else:
    ruleorder: train > restore
if SHIPPED_FLOWS:
    ruleorder: restore_flow > pretrain_noisy > pretrain
else:
    ruleorder: pretrain_noisy > pretrain > restore_flow


# A training that diverges is a result too: it fails, but leaves a record that says so.
rule train:
    input:
        IMAGES,
        [f"{BUILD}/data/{FOREIGN}/manifest.json"] if FOREIGN else [],
        start_of,
    output:
        f"{RUN}/{{task}}-{{prox}}/record.json",
    threads: workflow.cores
    shell:
        f"python -m flowlib train {CHOICE} --task {{wildcards.task}} --prox {{wildcards.prox}} || test -f {{output}}"


# The record of one method stands for all. It has every core to itself because it is timed.
rule classical:
    input:
        IMAGES,
        kept=KEPT_CLASSICAL,
    output:
        f"{RUN}/classical-deblurring-tikhonov/record.json",
    threads: workflow.cores
    params:
        kept=len(KEPT_CLASSICAL),
    shell:
        "if [ {params.kept} -gt 0 ]; then for record in {input.kept}; do"
        f"     folder={RUN}/$(basename $record .json) && mkdir -p $folder && cp $record $folder/record.json; done"
        f" else python -m flowlib classical {CHOICE}; fi"


rule tabulate:
    input:
        rules.classical.output,
        IMAGES,
        [f"{BUILD}/data/{FOREIGN}/manifest.json"] if FOREIGN else [],
        expand(f"{FLOWS}/{{flow}}/record.json", flow=["flow", "flow-noisy"]),
        expand(f"{RUN}/{{training}}/record.json", training=TRAININGS),
        recorded=sorted(str(path) for path in Path("results").rglob("*") if path.suffix in (".csv", ".json")),
    output:
        expand(f"{BUILD}/tables/{{table}}", table=TABLES),
    shell:
        f"python -m flowlib tabulate {CHOICE}"


# What the explorer page shows: grids of reconstructions, and the solvers as ONNX.
rule explorer:
    input:
        rules.tabulate.output,
    output:
        directory(f"{BUILD}/explorer"),
    threads: workflow.cores
    shell:
        f"python -m flowlib explorer {CHOICE}"


# What runs them in the reader's browser. Without npm the page shows the precomputed grids only.
rule onnxruntime_web:
    input:
        "package.json",
        "package-lock.json",
    output:
        directory(f"{BUILD}/ort"),
    shell:
        f"mkdir -p {BUILD}/npm {{output}} && cp {{input}} {BUILD}/npm"
        f" && if (cd {BUILD}/npm && npm ci --ignore-scripts --no-audit --no-fund > npm.log 2>&1); then"
        f"     cp {BUILD}/npm/node_modules/onnxruntime-web/dist/{{{{ort.wasm.min.mjs,ort-wasm-simd-threaded.mjs,"
        "ort-wasm-simd-threaded.wasm}} {output};"
        "    else echo 'npm is missing or failed: the explorer page will show its precomputed grids only'; fi"
        f" && rm -rf {BUILD}/npm/node_modules"


EXPLORER = [*rules.explorer.output, *rules.onnxruntime_web.output]


# Outputs of failed jobs are deleted, so papermill writes to the log: a failed notebook stays there to be read.
rule notebook:
    input:
        rules.tabulate.output,
        sorted(str(path) for path in Path("flowlib").rglob("*.*") if path.suffix in (".py", ".js", ".css")),
        lambda wildcards: EXPLORER if "explorer" in wildcards.notebook else [],
        notebook="notebooks/{notebook}.ipynb",
    output:
        f"{BUILD}/executed/{{notebook}}.ipynb",
    log:
        f"{BUILD}/logs/{{notebook}}.ipynb",
    threads: workflow.cores
    shell:
        "papermill {input.notebook} {log} --no-progress-bar --log-level WARNING"
        f" -p profile {PROFILE} -p dataset {DATASET} -p edition {EDITION} -p seed {SEED} -p build {BUILD}"
        " && cp {log} {output}"


# The book is built from a copy in which executed notebooks have taken the place of clean ones.
rule stage:
    input:
        "_config.yml",
        "_toc.yml",
        sorted(str(path) for path in Path("book").rglob("*.*") if "__pycache__" not in path.parts),
        rules.tabulate.input.recorded,
        explorer=EXPLORER,
        tables=rules.tabulate.output,
        notebooks=expand(f"{BUILD}/executed/{{notebook}}.ipynb", notebook=NOTEBOOKS),
    output:
        directory(f"{BUILD}/stage"),
    shell:
        "mkdir -p {output}/notebooks {output}/tables {output}/results"
        " && cp -r _config.yml _toc.yml book {output}"
        " && if [ -d results ]; then cp -r results {output}; fi"
        " && cp {input.notebooks} {output}/notebooks"
        " && cp {input.tables} {output}/tables"
        " && cp -r {input.explorer} {output}/book/_static"


# Built from empty, because incremental builds hide warnings. The old html stays until the new one is whole:
# Snakemake deletes only the file named as output, which is Sphinx's own mark of a build.
rule book:
    input:
        rules.stage.output,
    output:
        f"{BUILD}/html/.buildinfo",
    log:
        f"{BUILD}/logs/book.log",
    shell:
        f"rm -rf {BUILD}/_build"
        " && (jupyter-book build {input} --path-output " + BUILD + " -W -n --keep-going > {log} 2>&1"
        "     || {{ grep -E 'WARNING|ERROR|Error' {log} || tail -n 40 {log}; exit 1; }})"
        f" && rm -rf {BUILD}/html && mv {BUILD}/_build/html {BUILD}/html && rm -r {BUILD}/_build"
