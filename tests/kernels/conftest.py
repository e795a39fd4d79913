"""Tests under `launched` start Triton kernels: collected where there is a GPU or Triton's interpreter."""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = [] if INTERPRETED or torch.cuda.is_available() else ["launched"]
