# SPDX-License-Identifier: Apache-2.0
"""Weights from elsewhere: dense Megatron checkpoints into SparseK and back, and Hugging Face models."""
