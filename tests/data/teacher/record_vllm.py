"""Record what the vLLM engine calls, from a wheel: `python tests/data/teacher/record_vllm.py vllm-*.whl`."""

import ast
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

RECORDED = {
    "vllm/engine/arg_utils.py": ("EngineArgs",),
    "vllm/sampling_params.py": ("SamplingParams", "RequestOutputKind"),
    "vllm/lora/request.py": ("LoRARequest",),
    "vllm/inputs/llm.py": ("TokensPrompt", "EmbedsPrompt"),
    "vllm/outputs.py": ("RequestOutput", "CompletionOutput"),
    "vllm/v1/engine/llm_engine.py": ("LLMEngine",),
    "vllm/v1/engine/core_client.py": ("EngineCoreClient",),
    "vllm/usage/usage_lib.py": ("UsageContext",),
}


def record(wheel: Path) -> dict[str, Any]:
    """Fields and methods of the classes that are used."""
    found: dict[str, Any] = {}
    with zipfile.ZipFile(wheel) as archive:
        for path, names in RECORDED.items():
            for node in ast.parse(archive.read(path)).body:
                if isinstance(node, ast.ClassDef) and node.name in names:
                    methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
                    found[node.name] = {
                        "fields": [
                            target.id
                            for item in node.body
                            for target in (
                                item.targets
                                if isinstance(item, ast.Assign)
                                else [getattr(item, "target", None)]
                            )
                            if isinstance(target, ast.Name)
                        ],
                        "methods": {
                            method.name: [
                                argument.arg for argument in (*method.args.args, *method.args.kwonlyargs)
                            ]
                            for method in methods
                            if not method.name.startswith("_") or method.name == "__init__"
                        },
                    }
    return {"wheel": wheel.name, "classes": found}


if __name__ == "__main__":
    target = Path(__file__).with_name("vllm_signatures.json")
    target.write_text(json.dumps(record(Path(sys.argv[1])), indent=1) + "\n")
