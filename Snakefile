# From nothing to the book: prepare -> execute the notebooks, which train missing runs -> tabulate -> stage -> book.
# `make book` calls this file. One more way: snakemake --cores all --config profile=cpu dataset=celeba
# On a cluster, trainings are the notebooks' jobs: snakemake --profile profiles/slurm --config profile=paper dataset=celeba
import os
import shlex
import shutil
import sys
from pathlib import Path

sys.path.insert(0, workflow.basedir)
from companion.book import book_folder, hold
from companion.experiment import Experiment
from companion.imports import files_of
from companion.pages import pages
from companion.settings import OOD_IMAGES, retrain
from data import sources_of

PATHS = [workflow.basedir, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, PATHS)))
# Without a network npm would try for minutes.
for name, limit in {"retries": 1, "retry_mintimeout": 1000, "retry_maxtimeout": 1000, "timeout": 20000}.items():
    os.environ.setdefault(f"npm_config_fetch_{name}", str(limit))


def given(name, default):
    return str(config.get(name, default))  # Snakemake reads 2024_05_12 as a number


PROFILE, DATASET = given("profile", "demo"), given("dataset", "synthetic")
EDITION, SEED, BUILD = given("edition", "v2"), given("seed", 0), given("build", "build")
LARGE = ("gpu", "gpu-longer", "paper")  # profiles whose networks want a GPU
if "retrain" in config:
    os.environ["RETRAIN"] = given("retrain", 0)
book_folder(BUILD)  # refuses what commands cannot hold
EXPERIMENT = Experiment(PROFILE, DATASET, EDITION, int(SEED), BUILD)
PAGES = pages(EXPERIMENT)
TRAINING = [name for name, page in PAGES.items() if page.runs]
# Faces out of distribution, where the data set has such a companion.
OOD = OOD_IMAGES.get(DATASET)
if OOD and not (Path(BUILD) / "data" / OOD).exists() and not OOD.startswith("synthetic") and not sources_of(OOD):
    OOD = None  # the user has CelebA only
TABLES = ["table1.csv", "recorded_v2.csv", "recorded_v1.csv", "numbers.csv", "provenance.csv", "build.md"]
TABLES += ["front.md", "learning_rates.csv"]
CHOICE = shlex.join(
    ["--profile", PROFILE, "--dataset", DATASET, "--edition", EDITION, "--seed", SEED, "--build", BUILD]
)
WORDS = sorted(map(str, Path("book/_templates/words").glob("*.md")))  # sentences of pages and tables
EXPLORER_FILES = sorted(str(path) for path in Path("companion/explorer").iterdir() if path.suffix in (".js", ".css"))
RECORDED = sorted(str(path) for path in Path("results").rglob("*") if path.suffix in (".csv", ".json"))

# The Python that runs Snakemake; like BUILD without the project's own path, so that moving the project
# remakes nothing.
INSIDE = Path(sys.executable).is_relative_to(workflow.basedir)
PYTHON = shlex.quote(os.path.relpath(sys.executable, workflow.basedir) if INSIDE else sys.executable)


# So that `make book` can tell this Snakemake from one that was killed.
onstart:
    hold(BUILD)


wildcard_constraints:
    page="|".join(PAGES),


rule all:
    input:
        expand(f"{BUILD}/tables/{{table}}", table=TABLES),
        f"{BUILD}/html/.buildinfo",


# Remade when the source is replaced.
rule prepare:
    input:
        lambda wildcards: sources_of(wildcards.dataset),
    output:
        f"{BUILD}/data/{{dataset}}/images.npy",
        f"{BUILD}/data/{{dataset}}/manifest.json",
    shell:
        f"{PYTHON} -m companion prepare {{wildcards.dataset:q}} --build {BUILD}"


IMAGES = [f"{BUILD}/data/{name}/manifest.json" for name in (DATASET, OOD) if name]


def parameters(page):
    """papermill's arguments for a page, for a shell."""
    choice = {"profile": PROFILE, "dataset": DATASET, "edition": EDITION, "build": BUILD}
    words = [word for key, value in choice.items() for word in ("-r", key, value)]  # -r: as text, whatever it looks like
    words += ["-p", "seed", SEED]
    for key, value in PAGES[page].parameters.items():
        words += ["-p" if isinstance(value, bool) else "-r", key, str(value)]
    return shlex.join(words)


def needed(page):
    """The pages that train what this one starts from or shows."""
    if page == "pretrain_flow":
        return []
    if page == "pretrain_flow-noisy":
        return ["pretrain_flow"]
    if PAGES[page].runs:
        return ["pretrain_flow", "pretrain_flow-noisy"]
    return TRAINING


def cores(page):
    if not PAGES[page].runs:
        return 1
    return workflow.cores if page.startswith("pretrain_flow") else max(1, workflow.cores // 2)


# One rule a page. Outputs of failed jobs are deleted, so papermill writes to the log: a failed notebook stays there to be read.
# Two pages that train a solver run side by side, which small networks use better than twice the threads;
# on a cluster each has the resources of its rule. A page is made again when its runs' settings or the code of a
# training change (both are in the names of the runs' folders).
for page in PAGES:

    rule:
        name:
            f"page_{page}".replace("-", "_").replace(".", "_")
        input:
            IMAGES,
            WORDS,
            files_of(f"notebooks/{PAGES[page].notebook}.ipynb"),
            [f"{BUILD}/executed/{other}.ipynb" for other in needed(page)],
            [f"{BUILD}/tables/build.md", *RECORDED] if not PAGES[page].runs else [],
            [f"{BUILD}/explorer", f"{BUILD}/ort", *EXPLORER_FILES] if page == "explorer" else [],
            notebook=f"notebooks/{PAGES[page].notebook}.ipynb",
        output:
            f"{BUILD}/executed/{page}.ipynb",
        log:
            f"{BUILD}/logs/{page}.ipynb",
        params:
            runs=[run.folder_name for run in PAGES[page].runs],
            retrain=retrain(),
            words=parameters(page),
            about=PAGES[page].about,
        threads: cores(page)
        resources:
            gpu=1 if PAGES[page].runs and PROFILE in LARGE else 0,
            mem_mb=24000 if PROFILE in LARGE else 4000,
            runtime=60 * 24 if PROFILE == "paper" else 60 * 6,
        shell:
            f"{PYTHON} -m papermill {{input.notebook:q}} {{log:q}} --no-progress-bar --log-level WARNING {{params.words}}"
            f" && {PYTHON} -m companion.postprocess {{log:q}} {{output:q}} {{params.about:q}}"


# Timed, so it gets all cores. The record of one method stands for all.
rule classical:
    input:
        IMAGES[0],
        "flowlib/operators.py",
        "companion/classical.py",
    output:
        f"{BUILD}/classical/{EXPERIMENT.key}-{EDITION}",
    threads: workflow.cores
    shell:
        f"{PYTHON} -m companion classical {CHOICE} && touch {{output:q}}"


rule tabulate:
    input:
        IMAGES,
        rules.classical.output,
        WORDS,
        files_of("companion/tables.py", "companion/front.py"),
        RECORDED,
        expand(f"{BUILD}/executed/{{page}}.ipynb", page=TRAINING),
    output:
        expand(f"{BUILD}/tables/{{table}}", table=TABLES),
    shell:
        f"{PYTHON} -m companion tabulate {CHOICE}"


# The explorer page's data: grids of reconstructions, and the solvers as ONNX.
rule explorer:
    input:
        rules.tabulate.output,
        files_of("companion/explorer/page.py"),
    output:
        directory(f"{BUILD}/explorer"),
    priority: 1  # its page waits for it
    shell:
        f"{PYTHON} -m companion explorer {CHOICE}"


# The runtime for them in the reader's browser. Without npm the page shows the precomputed grids only; the next build tries again.
rule onnxruntime_web:
    input:
        "package.json",
        "package-lock.json",
    output:
        directory(f"{BUILD}/ort"),
    params:
        npm=bool(shutil.which("npm")),
    shell:
        f"mkdir -p {BUILD}/npm {{output:q}} && cp {{input}} {BUILD}/npm"
        f" && if (cd {BUILD}/npm && npm ci --ignore-scripts --no-audit --no-fund > npm.log 2>&1); then"
        f"     cp {BUILD}/npm/node_modules/onnxruntime-web/dist/{{{{ort.wasm.min.mjs,ort-wasm-simd-threaded.mjs,"
        "ort-wasm-simd-threaded.wasm}} {output};"
        f"    else echo 'npm is missing or failed (see {BUILD}/npm/npm.log): the explorer page will show its precomputed"
        " grids only; the next build tries again'; fi"
        f" && rm -rf {BUILD}/npm/node_modules"


EXPLORER = [*rules.explorer.output, *rules.onnxruntime_web.output]


# The book is built from a copy in which executed notebooks have taken the place of clean ones.
rule stage:
    input:
        "_config.yml",
        "_toc.yml",
        sorted(str(path) for path in Path("book").rglob("*.*") if "__pycache__" not in path.parts),
        RECORDED,
        explorer=EXPLORER,
        tables=rules.tabulate.output,
        notebooks=expand(f"{BUILD}/executed/{{page}}.ipynb", page=PAGES),
    output:
        directory(f"{BUILD}/stage"),
    shell:
        "mkdir -p {output}/notebooks {output}/tables {output}/results {output}/extra/records"
        " && cp -r _config.yml _toc.yml book {output}"
        " && if [ -d results ]; then cp -r results {output}; fi"
        # Every number's record goes with the book: those kept with the code, and this build's own.
        " && if [ -d results/runs ]; then cp -r results/runs/. {output}/extra/records; fi"
        " && if [ -d results/benchmarks ]; then cp -r results/benchmarks {output}/extra/records; fi"
        f" && if [ -d {BUILD}/records ]; then cp -r {BUILD}/records/. {{output}}/extra/records; fi"
        " && cp {input.notebooks} {output}/notebooks"
        f" && cp {BUILD}/tables/* {{output}}/tables"
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
        f"rm -rf {BUILD}/_build && ({PYTHON} -c 'from jupyter_book.cli.main import main; main()' build {{input}}"
        f" --path-output {BUILD} -W -n --keep-going > {{log}} 2>&1"
        "     || {{ grep -E 'WARNING|ERROR|Error' {log} || tail -n 40 {log}; exit 1; }})"
        f" && rm -rf {BUILD}/html && mv {BUILD}/_build/html {BUILD}/html && rm -r {BUILD}/_build"
