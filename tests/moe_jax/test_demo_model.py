"""The model that ships with the package against `transformers`, which loads the same files."""

import numpy as np
import pytest

from moe_jax import LLM, SamplingParams
from moe_jax.llm import model_directory

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PROMPTS = [
    "The capital of", "My fellow citizens,", "Once upon a time", "It was a dark and stormy night, and", "Call me",
    "In Python, a list is", "The President of the United States", "A whale", "Elinor could not help", "The Senate",
    "To create a table, use", "I have the honor to", "There is no", "Mr. Darcy", "When the server starts,",
    "The function returns", "We must", "The sea was", "Our relations with foreign nations", "What does",
]  # fmt: skip


def test_greedy_tokens_and_scores_equal_those_of_transformers() -> None:
    """For all prompts transformers is asked for each next token given ours so far, which is what its greedy `generate`
    does, in one forward pass; for some of them `generate` itself is run."""
    path = model_directory("demo")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with LLM("demo", max_batch=16, max_prefill_rows=32, max_model_len=512) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True))
        with torch.inference_mode():
            for i, out in enumerate(outputs):
                n, tokens = len(out.prompt_token_ids), [*out.prompt_token_ids, *out.outputs[0].token_ids]
                logits = model(torch.tensor([tokens])).logits[0]
                assert tokens[n:] == logits[n - 1 : -1].argmax(-1).tolist(), out.prompt
                np.testing.assert_allclose(llm.score(tokens), torch.log_softmax(logits, -1), rtol=0, atol=2e-4)
                if i % 10 == 0:
                    ids = torch.tensor([tokens[:n]])
                    expected = model.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False)
                    assert tokens == expected[0].tolist(), out.prompt
