"""A JAX runtime that serves Mixture-of-Experts language models and keeps answering while hosts die and come back."""

from moe_jax.llm import LLM
from moe_jax.request import SamplingParams

__all__ = ["LLM", "SamplingParams"]
