"""Load tests of any OpenAI-compatible server, comparisons with other engines, and simulations.

    python -m loadtest chat --base-url http://127.0.0.1:8000      a scenario against a server
    python -m loadtest.compare --cache-dir ~/.cache/quire-compare   the same work on several engines
    python -m loadtest.fleet TRACE.jsonl                            how many pods a trace needs

They share the client and the figures of `quire bench serve`.
"""
