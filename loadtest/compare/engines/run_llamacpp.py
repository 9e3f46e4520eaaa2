"""llama.cpp through llama-cpp-python's plain bindings, with continuous batching over them.

The bindings' own `Llama` runs one sequence; here every step decodes one batch: a token of each
running sequence, then as much of waiting prompts as fits. Greedy, argmax in numpy.
"""

import sys

from protocol import serve

SEQUENCES, BATCH, CONTEXT = 64, 2048, 2048


class Engine:
    """A model and a context with room for SEQUENCES."""

    def __init__(self, path, threads):
        import llama_cpp
        import numpy as np

        self.lib, self.np = llama_cpp, np
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 32 * CONTEXT, BATCH, 512
        params.n_seq_max, params.kv_unified = SEQUENCES, True
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self.model)
        )

    def generate(self, prompts, output_lens):
        """Greedy tokens of each prompt."""
        memory = self.lib.llama_get_memory(self.context)
        self.lib.llama_memory_clear(memory, True)
        tokens = [[] for _ in prompts]
        done = [0] * len(prompts)  # tokens computed
        waiting, running = list(range(len(prompts)))[::-1], {}  # request -> sequence
        free = list(range(SEQUENCES))
        while waiting or running:
            while waiting and free:
                running[waiting.pop()] = free.pop()
            drawn = self.step(prompts, tokens, done, running)
            for request, row in drawn:
                logits = self.lib.llama_get_logits_ith(self.context, row)
                values = self.np.ctypeslib.as_array(logits, shape=(self.vocab_size,))
                tokens[request].append(int(values.argmax()))
                if len(tokens[request]) == output_lens[request]:
                    sequence = running.pop(request)
                    self.lib.llama_memory_seq_rm(memory, sequence, -1, -1)
                    free.append(sequence)
        return tokens

    def step(self, prompts, tokens, done, running):
        """Decode one batch; (request, row) of the sequences whose next token can be drawn."""
        rows, drawn = 0, []
        decoding = sorted(running, key=lambda r: done[r] < len(prompts[r]))
        for request in decoding:
            known = prompts[request] if done[request] < len(prompts[request]) else None
            part = known[done[request] :] if known else tokens[request][-1:]
            part = part[: BATCH - rows]
            for offset, token in enumerate(part):
                self.put(rows + offset, token, done[request] + offset, running[request])
            rows, done[request] = rows + len(part), done[request] + len(part)
            if part and done[request] >= len(prompts[request]):
                self.batch.logits[rows - 1] = True
                drawn.append((request, rows - 1))
        self.batch.n_tokens = rows
        if self.lib.llama_decode(self.context, self.batch) != 0:
            raise RuntimeError("llama_decode failed")
        return drawn

    def put(self, row, token, position, sequence):
        """One row of the batch, without logits."""
        self.batch.token[row], self.batch.pos[row] = token, position
        self.batch.n_seq_id[row], self.batch.seq_id[row][0] = 1, sequence
        self.batch.logits[row] = False


def main():
    """Load and serve: GGUF_FILE DTYPE THREADS."""
    engine = Engine(sys.argv[1], int(sys.argv[3]))
    serve("llama.cpp", engine.generate)


if __name__ == "__main__":
    main()
