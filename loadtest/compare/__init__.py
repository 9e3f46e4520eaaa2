"""The same work on Quire and on other engines, alternately, each in an environment of its own.

cache folder/                 environments.py: one venv per engine, made when missing
  vllm/ transformers/ llama.cpp/ models/
engines/NAME.py               runs in that engine's interpreter; knows nothing of quire or of us
process.py                    one such process: ask it, freeze it while another is measured
workloads.py                  decode at a batch size, mixed lengths, prefill
offline.py, http.py           rounds A B C A B C ..., then medians, spread and ratios
"""
