"""Judge the shipped weight files themselves: python tools/shipped.py [NAME...], into results/shipped.json

A record's accuracy was measured in training's precision, with the weights as trained. What the float16 file gives,
evaluated in float32 on a CPU, is another number: it is measured here and read by `convmixer_edu.ledger`.
"""

import json
import sys

import torch

from convmixer_edu.checkpoint import write_json
from convmixer_edu.data import load_images
from convmixer_edu.inference import load_run, score
from convmixer_edu.ledger import list_records, read_record, results_folder
from convmixer_edu.machine import who_ran


def main(wanted):
    file = results_folder() / "shipped.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    with_weights = [n for n in list_records() if (results_folder() / n / "model.safetensors").exists()]
    for name in wanted or with_weights:
        run, device = read_record(name), torch.device("cpu")  # its seal holds
        model, info = load_run(results_folder() / name)
        data = load_images(None, "test", None, info.config.image_size)
        if data.fingerprint != run["test_fingerprint"]:
            raise SystemExit(f"{name} was judged on other images: expected the test set of its record, "
                             "name it with CONVMIXER_DATA")
        seen = score(model, data, info.stats, dtype=torch.float32)
        machine = who_ran(device)
        found[name] = {"accuracy": seen["accuracy"], "loss": round(seen["loss"], 4), "images": seen["images"],
                       "record": json.loads((results_folder() / name / "record.json").read_text())["sha256"],
                       **{key: machine[key] for key in ("device", "precision", "torch", "commit")}}
        print(json.dumps({name: found[name]}), flush=True)
        write_json(file, dict(sorted(found.items())))


if __name__ == "__main__":
    main(sys.argv[1:])
