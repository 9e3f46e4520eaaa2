"""transformers: padded batches of up to 32 (the default), or its continuous batching."""

import sys

from protocol import serve

BATCH = 32


def padded(model, torch, prompts, output_lens):
    """Left-padded batches, each run to its longest output; tokens beyond those asked for are
    dropped."""
    tokens = []
    for start in range(0, len(prompts), BATCH):
        batch, wanted = prompts[start : start + BATCH], output_lens[start : start + BATCH]
        width, longest = max(map(len, batch)), max(wanted)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(batch):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        made = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=longest, min_new_tokens=longest,
            do_sample=False, pad_token_id=0, eos_token_id=None,
        )[:, width:]  # fmt: skip
        tokens += [row[:n] for row, n in zip(made.tolist(), wanted, strict=True)]
    return tokens


def continuous(model, transformers, prompts, output_lens):
    """Its paged engine. It has one output length for all: the mean."""
    mean = max(1, round(sum(output_lens) / len(output_lens)))
    config = transformers.GenerationConfig(
        max_new_tokens=mean, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    made = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
    return [list(made[name].generated_tokens) for name in sorted(made)]


def main():
    """Load and serve: MODEL DTYPE [--continuous]."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        sys.argv[1], dtype=getattr(torch, sys.argv[2]), attn_implementation="sdpa"
    ).eval()
    model.generation_config.eos_token_id = None
    name = f"transformers {transformers.__version__}"
    if "--continuous" in sys.argv:
        serve(f"{name} continuous", lambda p, n: continuous(model, transformers, p, n))
    else:
        serve(f"{name} padded", lambda p, n: padded(model, torch, p, n))


if __name__ == "__main__":
    main()
