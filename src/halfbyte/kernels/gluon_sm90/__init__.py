"""Kernels for NVIDIA Hopper in Gluon. A file's name says op, format and part of the range of token counts it is for."""
