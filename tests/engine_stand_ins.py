"""Stand-ins for vLLM and SGLang: packages with the names that `bench serve` uses, around one MoE layer in plain torch.

The layer's Parameters are those of the engine for ModelOpt NVFP4; "generation" repeats a prompt's last token. They show that the benchmark asks for
what it should, refuses what is wrong, and tells what it found; that the real engines have these names and results, they cannot show.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from halfbyte.bench.serve_weights import Geometry
from halfbyte.bench.shapes import MoEShape

TELL = """
import json, os

def tell(**what):
    with open(os.environ["STAND_IN_LOG"], "a") as log:
        log.write(json.dumps({**what, "plugins": os.environ.get("VLLM_PLUGINS", os.environ.get("SGLANG_PLUGINS"))}) + "\\n")
"""

LAYER = """
import time
import torch
from torch import nn

H, I, E, K = 64, 32, 4, 2

def dense(codes, scales, outer):
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    values = torch.stack((table[(codes & 15).long()], table[(codes >> 4).long()]), -1).flatten(-2)
    return values * scales.float().repeat_interleave(16, -1) * outer.flatten()[0]

class Method:
    def __init__(self, wrong):
        self.wrong = wrong

    def compute(self, layer, x, weights, ids):
        out = torch.zeros(x.shape)
        for token in range(len(x)):
            for slot in range(K):
                e = int(ids[token, slot])
                w13 = dense(layer.w13_weight[e], layer.w13_weight_scale[e], layer.w13_weight_scale_2[e])
                w2 = dense(layer.w2_weight[e], layer.w2_weight_scale[e], layer.w2_weight_scale_2[e])
                gate, up = (x[token].float() @ w13.T).chunk(2)
                out[token] += weights[token, slot] * ((nn.functional.silu(gate) * up) @ w2.T)
        return (out * (0.9 if self.wrong else 1.0)).bfloat16()

def experts(cls, wrong):
    layer = cls()
    for side, rows, columns in (("w13", 2 * I, H), ("w2", H, I)):
        tensors = {
            "weight": torch.empty(E, rows, columns // 2, dtype=torch.uint8),
            "weight_scale": torch.empty(E, rows, columns // 16, dtype=torch.float8_e4m3fn),
            "weight_scale_2": torch.empty((E, 2) if side == "w13" else (E,)),
            "input_scale": torch.empty(E),
        }
        for name, tensor in tensors.items():
            layer.register_parameter(f"{side}_{name}", nn.Parameter(tensor, requires_grad=False))
    layer.hidden_size, layer.top_k, layer.quant_method = H, K, Method(wrong)
    layer.global_num_experts = layer.num_experts = E
    model = nn.Module()
    model.norm = nn.Module()
    model.norm.weight = nn.Parameter(torch.empty(H))
    model.layers = nn.ModuleList([nn.Module()])
    model.layers[0].experts = layer
    return model

def answers(prompts, count):
    time.sleep(1e-4 * (1 + count) * len(prompts))
    return [prompt[-1:] * count for prompt in prompts]
"""

VLLM = {
    "vllm/stand_in.py": LAYER,
    "vllm/telling.py": TELL,
    "vllm/model_executor/__init__.py": "",
    "vllm/model_executor/model_loader/__init__.py": """
        LOADERS = {}
        def register_model_loader(name):
            return lambda cls: LOADERS.setdefault(name, cls)
    """,
    "vllm/model_executor/model_loader/base_loader.py": """
        class BaseModelLoader:
            pass
        def process_weights_after_loading(model, model_config, target_device):
            pass
    """,
    "vllm/__init__.py": """
        import importlib
        def __getattr__(name):  # the server needs no torch
            return getattr(importlib.import_module("vllm.offline"), name)
    """,
    "vllm/offline.py": """
        from types import SimpleNamespace as Namespace
        from vllm.stand_in import experts, answers, Method
        from vllm.telling import tell
        import torch
        class RoutedExperts(torch.nn.Module):
            pass
        class ModelRoutedExperts(RoutedExperts):  # as gpt-oss has
            pass
        class SamplingParams:
            def __init__(self, temperature, max_tokens, ignore_eos, detokenize):
                assert temperature == 0 and ignore_eos and not detokenize
                self.max_tokens = max_tokens
        class LLM:
            def __init__(self, **given):
                from vllm.model_executor.model_loader import LOADERS, base_loader
                options = given.get("additional_config", {}).get("halfbyte", {})
                tell(**given)
                mode = given.get("stand_in", "")
                if mode == "broken" and options:
                    raise RuntimeError("no kernel image")
                Method.apply = lambda self, layer, x, weights, ids, shared, inputs: self.compute(layer, x, weights, ids)
                model = experts(ModelRoutedExperts, wrong=mode == "wrong" and bool(options))
                LOADERS[given["load_format"]]().load_weights(model, None)
                base_loader.process_weights_after_loading(model, None, None)
                cache = Namespace(num_gpu_blocks=10, block_size=16)
                self.llm_engine = Namespace(vllm_config=Namespace(cache_config=cache))
            def generate(self, prompts, sampling, use_tqdm):
                print("a line of the engine's own")
                ids = answers([prompt["prompt_token_ids"] for prompt in prompts], sampling.max_tokens)
                return [Namespace(outputs=[Namespace(token_ids=tuple(one))]) for one in ids]
    """,
    "vllm/entrypoints/__init__.py": "",
    "vllm/entrypoints/cli/__init__.py": "",
    "vllm/entrypoints/cli/main.py": """
        import http.server, json, sys, time
        from vllm.telling import tell
        tell(server=sys.argv[1:])
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200 if asked["model"] == sys.argv[sys.argv.index("--served-model-name") + 1] else 404)
                self.end_headers()
                for _ in range(asked["max_tokens"]):
                    time.sleep(0.005)
                    self.wfile.write(b'data: {"choices": [{"text": "a"}]}\\n\\n')
                self.wfile.write(b'data: {"choices": [], "usage": {"completion_tokens": 1}}\\n\\ndata: [DONE]\\n\\n')
            def log_message(self, *args):
                pass
        port = int(sys.argv[sys.argv.index("--port") + 1])
        http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
    """,
}

SGLANG = {
    "sglang/stand_in.py": LAYER,
    "sglang/telling.py": TELL,
    "sglang/srt/__init__.py": "",
    "sglang/srt/layers/__init__.py": "",
    "sglang/srt/layers/moe/__init__.py": "",
    "sglang/srt/layers/moe/topk.py": """
        from collections import namedtuple
        StandardTopKOutput = namedtuple("StandardTopKOutput", "weights ids logits")
    """,
    "sglang/srt/layers/moe/token_dispatcher/__init__.py": "",
    "sglang/srt/layers/moe/token_dispatcher/standard.py": """
        from collections import namedtuple
        StandardDispatchOutput = namedtuple("StandardDispatchOutput", "hidden_states hidden_states_scale topk_output")
    """,
    "sglang/srt/plugins/__init__.py": "",
    "sglang/srt/plugins/hook_registry.py": """
        import enum, functools, importlib
        HookType = enum.Enum("HookType", "AROUND")
        class HookRegistry:
            hooks = {}
            @classmethod
            def register(cls, target, hook, kind):
                cls.hooks[target] = hook
            @classmethod
            def apply(cls):
                from sglang.srt.model_loader import loader
                for target, hook in cls.hooks.items():
                    path = target.removeprefix("sglang.srt.model_loader.loader.").split(".")
                    owner = functools.reduce(getattr, path[:-1], loader)
                    setattr(owner, path[-1], functools.partial(hook, getattr(owner, path[-1])))
    """,
    "sglang/srt/model_loader/__init__.py": "",
    "sglang/srt/model_loader/loader.py": """
        import torch
        from types import SimpleNamespace
        from sglang.stand_in import experts, Method
        class FusedMoE(torch.nn.Module):
            pass
        def initialize_dummy_weights(model):
            raise AssertionError("dummy weights are not the benchmark's")
        class DummyModelLoader:
            @staticmethod
            def load_model():
                Method.apply = lambda self, layer, given: SimpleNamespace(
                    hidden_states=self.compute(layer, given.hidden_states, given.topk_output.weights, given.topk_output.ids))
                model = experts(FusedMoE, wrong=False)
                initialize_dummy_weights(model)
                return model
    """,
    "sglang/__init__.py": """
        import multiprocessing
        from sglang.stand_in import answers
        from sglang.telling import tell
        def scheduler():
            from sglang.srt.plugins.hook_registry import HookRegistry
            from sglang.srt.model_loader import loader
            HookRegistry.apply()
            loader.DummyModelLoader.load_model()
        class Engine:
            def __init__(self, **given):
                tell(**given)
                process = multiprocessing.get_context("spawn").Process(target=scheduler)
                process.start()
                process.join()
                assert process.exitcode == 0
            def generate(self, input_ids, sampling_params):
                return [{"output_ids": one} for one in answers(input_ids, sampling_params["max_new_tokens"])]
            def get_server_info(self):
                return {"max_total_num_tokens": 160}
    """,
}


TINY = Geometry("tiny", MoEShape("tiny", 64, 32, 4, 2), {"vocab_size": 100, "model_type": "qwen3_moe"})

# Runs at the start of each process of the stand-in's; those of its server need no torch.
_ADD_TINY = """
import sys
if "halfbyte.bench.serve_worker" in sys.orig_argv or "--multiprocessing-fork" in sys.orig_argv:
    import engine_stand_ins
    from halfbyte.bench.serve_weights import GEOMETRIES
    GEOMETRIES["tiny"] = engine_stand_ins.TINY
"""


def write_stand_in(directory: Path, engine: str) -> None:
    """Lay the engine's stand-in down in `directory`, with halfbyte's plug-in as an installation registers it."""
    files, group = {"vllm": (VLLM, "vllm.general_plugins"), "sglang": (SGLANG, "sglang.srt.plugins")}[engine]
    info = {
        f"{engine}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {engine}\nVersion: 1.0\n",
        f"{engine}-1.0.dist-info/entry_points.txt": f"[{group}]\nhalfbyte = halfbyte.integrations.stand_in:register\n",
    }
    info[f"{engine}-1.0.dist-info/top_level.txt"] = engine
    for name, source in {**files, **info, "sitecustomize.py": _ADD_TINY}.items():
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(source))
