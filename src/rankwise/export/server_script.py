"""Run by a server's own Python: serve a model and an adapter, and print their answers. Imports nothing of rankwise.

In (standard input, JSON): server, model, adapter (a path or null), r, prompts and answers (lists of token ids),
new_tokens; labels (num_labels and problem_type of a head, or null). Out (standard output, JSON): for "base" and, with
an adapter, "adapted" the greedy "texts" (ids) and the "logprobs" of each answer's tokens after its prompt, or of a head
its logits; and the server's "version".
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from typing import Any

THREADS = 2
# JSON, in and out.
Document = dict[str, Any]


def llama_cpp(job: Document) -> Document:
    import xllamacpp

    found: Document = {"version": f"llama.cpp by xllamacpp {xllamacpp.__version__}"}
    # A server for each: one that is asked with a different scale of the adapter may keep a prompt's state.
    for name in ("base", "adapted") if job["adapter"] else ("base",):
        params = xllamacpp.CommonParams()
        params.model.path = job["model"]
        params.n_ctx, params.n_parallel, params.warmup = 2048, 1, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
        if name == "adapted":
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(job["adapter"], 1.0)]
        server = xllamacpp.Server(params)
        found[name] = llama_answers(server.listening_address, job)
        del server
    return found


def llama_answers(address: str, job: Document) -> Document:
    def ask(prompt: list[int], **more: Any) -> Document:
        body = json.dumps({"prompt": prompt, "temperature": 0, **more}).encode()
        request = urllib.request.Request(f"{address}/completion", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return dict(json.load(answer))

    texts: list[list[int]] = []
    logprobs: list[list[float]] = []
    for prompt, tokens in zip(job["prompts"], job["answers"]):
        texts.append(ask(prompt, n_predict=job["new_tokens"], return_tokens=True)["tokens"])
        logprobs.append([])
        for index, token in enumerate(tokens):
            # The bias makes the token the greedy choice; the log-probability told is that before it.
            told = ask(prompt + tokens[:index], n_predict=1, n_probs=1, logit_bias=[[token, 1000.0]])
            first = told["completion_probabilities"][0]
            assert first["id"] == token, f"asked for token {token}, got {first['id']}"
            logprobs[-1].append(first["logprob"])
    return {"texts": texts, "logprobs": logprobs}


def vllm(job: Document) -> Document:
    # vLLM's cache takes a good part of the memory otherwise.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import vllm
    from vllm.lora.request import LoRARequest

    given: Document = {"enable_lora": True, "max_lora_rank": job["r"], "max_loras": 1} if job["adapter"] else {}
    given["max_model_len"] = 1024
    if job["labels"]:
        given |= {"runner": "pooling", "convert": "classify", "hf_overrides": job["labels"]}
        # Encoders have learned positions, and few.
        given["max_model_len"] = max(map(len, job["prompts"]))
    # One sequence at a time: with adapters, vLLM 0.32 on a CPU fails on a batch of prompts.
    model = vllm.LLM(model=job["model"], enforce_eager=True, max_num_seqs=1, disable_log_stats=True, **given)
    found: Document = {"version": f"vLLM {vllm.__version__}"}
    for name in ("base", "adapted") if job["adapter"] else ("base",):
        lora = LoRARequest("adapter", 1, job["adapter"]) if name == "adapted" else None
        # Its progress bar divides by zero where bars are disabled.
        options = {"use_tqdm": False, "lora_request": lora}
        prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
        if job["labels"]:
            classified = model.classify(prompts, pooling_params=vllm.PoolingParams(use_activation=False), **options)
            found[name] = {"texts": [], "logprobs": [list(map(float, out.outputs.probs)) for out in classified]}
            continue
        greedy = vllm.SamplingParams(temperature=0, max_tokens=job["new_tokens"])
        texts = [list(out.outputs[0].token_ids) for out in model.generate(prompts, greedy, **options)]
        whole = [{"prompt_token_ids": prompt + answer} for prompt, answer in zip(job["prompts"], job["answers"])]
        scoring = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        scored = model.generate(whole, scoring, **options)
        logprobs = []
        for out, prompt, answer in zip(scored, job["prompts"], job["answers"]):
            told = out.prompt_logprobs[len(prompt) :]
            logprobs.append([float(position[token].logprob) for position, token in zip(told, answer)])
        found[name] = {"texts": texts, "logprobs": logprobs}
    return found


if __name__ == "__main__":
    # Servers log to standard output, and so do their processes: that goes to the error stream here.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    given = json.load(sys.stdin)
    answers.write(json.dumps({"llama.cpp": llama_cpp, "vllm": vllm}[given["server"]](given)))
    answers.close()
