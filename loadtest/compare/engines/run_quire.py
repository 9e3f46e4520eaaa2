"""Quire's `LLM.generate`, scheduler and sampler included."""

import sys

from protocol import serve

from quire import LLM, SamplingParams, __version__


def main():
    """Load and serve: MODEL DTYPE."""
    llm = LLM(
        sys.argv[1], dtype=sys.argv[2], max_model_len=2048, max_num_seqs=64,
        enable_prefix_caching=False,
    )  # fmt: skip

    def generate(prompts, output_lens):
        params = [
            SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in output_lens
        ]
        asked = [{"prompt_token_ids": p} for p in prompts]
        return [o.outputs[0].token_ids for o in llm.generate(asked, params, use_tqdm=False)]

    serve(f"quire {__version__}", generate)


if __name__ == "__main__":
    main()
