"""Architectures behind published metric weights: from torchvision, timm and open_clip, and small ports where none of them has one."""
