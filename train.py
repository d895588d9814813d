"""`python train.py --train_data train_data.json --output_dir model`: the same as `scaledown train`."""

from scaledown.student.train import main

if __name__ == "__main__":
    raise SystemExit(main(program="python train.py"))
