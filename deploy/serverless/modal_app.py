"""Quire on Modal: one GPU per container, as many containers as there is traffic, none without.

    pip install modal && modal setup
    modal secret create quire QUIRE_API_KEY=$(openssl rand -hex 24)
    modal deploy deploy/serverless/modal_app.py

What a serverless platform takes away: containers do not reach each other, so that each is a whole
server and prefill and decode are not apart; the platform's proxy chooses the container, so that a
cached prefix is found by chance; a container that ends takes its streams with it after
`--shutdown-timeout`, because there is no other worker to hand them to.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import modal

MODEL = "Qwen/Qwen3-0.6B"
PORT = 8000
START_S = 600
IDLE_S = 300
REQUESTS = 64
"""Per container at once; more make Modal start another."""
COMMAND = [
    "quire", "serve", MODEL, "--device=cuda", "--host=0.0.0.0", f"--port={PORT}",
    f"--max-num-seqs={REQUESTS}", "--log-format=json",
]  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]

image = (
    modal.Image.debian_slim(python_version="3.12")
    .apt_install("g++")
    .add_local_dir(ROOT / "kernels", "/src/kernels", copy=True)
    .add_local_dir(ROOT / "services", "/src/services", copy=True)
)
for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
    image = image.add_local_file(ROOT / name, f"/src/{name}", copy=True)
image = image.run_commands("pip install /src").env({"HF_HOME": "/cache/huggingface"})

app = modal.App("quire", image=image)


@app.function(
    gpu="L4",
    volumes={"/cache": modal.Volume.from_name("quire-cache", create_if_missing=True)},
    secrets=[modal.Secret.from_name("quire")],
    scaledown_window=IDLE_S,
    timeout=24 * 3600,
)
@modal.concurrent(max_inputs=REQUESTS)
@modal.web_server(port=PORT, startup_timeout=START_S)
def serve() -> None:
    """Start the server; Modal forwards to its port once that is open."""
    subprocess.Popen(COMMAND)
