#!/usr/bin/env bash
# Runs in the fresh environment, from the root of the checkout: the locked packages, then this checkout.
set -euo pipefail
python -m pip install --require-hashes --requirement requirements.lock
python -m pip install --no-deps --editable .
