#!/bin/sh
# Packs what a machine without network lacks beside PyTorch, Triton and transformers, for Python 3.12 on Linux: 38 MB.
#
#   sh workflow/envs/offline.sh .device                     here: makes .device/offline.tar.xz, of the locked versions
#
#   tar xJf .device/offline.tar.xz -C /tmp/offline          there, in the root of a copy of this repository
#   export PATH=/tmp/offline/bin:$PATH PYTHONPATH=/tmp/offline/site:$PWD:$PWD/kernels:$PWD/eval
#
# Left out: pulp (16 MB; Snakemake does without, with --scheduler greedy), Jupyter, and the test tools.
set -eu
output=$1
wanted="accelerate annotated-types argparse-dataclass av conda-inject configargparse connection-pool diffusers docutils dpath
fastjsonschema ftfy gitdb gitpython greenlet humanfriendly immutables importlib-metadata jsonschema jsonschema-specifications
jupyter-core lazy-importer nbformat open-clip-torch platformdirs psutil pydantic pydantic-core referencing rpds-py scikit-video
smart-open smmap snakemake snakemake-interface-common snakemake-interface-executor-plugins snakemake-interface-logger-plugins
snakemake-interface-report-plugins snakemake-interface-scheduler-plugins snakemake-interface-storage-plugins sqlalchemy
sqlmodel tenacity throttler traitlets typing-inspection wcwidth yte"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$output" "$work/site" "$work/bin" "$work/wheels"
for name in $wanted; do
    # Where the lock has one version for each Python, the last is that of 3.12.
    sed -n "s/^\\($name==[^ ;]*\\).*/\\1/p" requirements.lock | tail -n 1
done > "$work/pins.txt"
grep -v connection-pool "$work/pins.txt" > "$work/wheels.txt"
python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
    --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --dest "$work/wheels" --requirement "$work/wheels.txt"
python -m pip wheel --quiet --no-deps --wheel-dir "$work/wheels" "$(grep connection-pool "$work/pins.txt")" # has no wheel
for wheel in "$work"/wheels/*.whl; do
    python -m zipfile -e "$wheel" "$work/site"
done
printf '#!/bin/sh\nexec python3 "$@"\n' > "$work/bin/python"
printf '#!/bin/sh\nexec python3 -m snakemake "$@"\n' > "$work/bin/snakemake"
printf '#!/bin/sh\nexec python3 -c "from sla2.cli import main; main()" "$@"\n' > "$work/bin/sla2"
chmod +x "$work"/bin/*
tar cJf "$output/offline.tar.xz" -C "$work" site bin
ls -l "$output/offline.tar.xz"
