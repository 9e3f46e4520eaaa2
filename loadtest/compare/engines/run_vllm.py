"""vLLM's `LLM.generate`."""

import sys

from protocol import serve


def main():
    """Load and serve: MODEL DTYPE [--eager]."""
    from vllm import LLM, SamplingParams, __version__

    eager = "--eager" in sys.argv
    llm = LLM(
        model=sys.argv[1], dtype=sys.argv[2], enforce_eager=eager, max_model_len=2048,
        max_num_seqs=64, enable_prefix_caching=False, disable_log_stats=True, seed=0,
    )  # fmt: skip

    def generate(prompts, output_lens):
        params = [
            SamplingParams(temperature=0.0, max_tokens=n, min_tokens=n, ignore_eos=True)
            for n in output_lens
        ]
        asked = [{"prompt_token_ids": p} for p in prompts]
        return [list(o.outputs[0].token_ids) for o in llm.generate(asked, params, use_tqdm=False)]

    serve(f"vllm {__version__} {'eager' if eager else 'compiled'}", generate)


if __name__ == "__main__":
    main()
