"""SLA2: sparse-linear attention with learnable routing and quantisation-aware training (arXiv 2602.12675)."""
