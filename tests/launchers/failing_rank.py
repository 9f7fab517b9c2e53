"""pretrain.py with a fault: rank 1 raises in its third optimizer step. Started by test_pretrain.py."""

import sys

from ds_stacking.command_line import parse_run, run_main


def main() -> None:
    config = parse_run(sys.argv[1:])

    from ds_stacking.training.loop import Pretraining
    from ds_stacking.training.run import pretrain

    original = Pretraining.train_step

    def train_step(self: Pretraining, micro_batches: list) -> None:
        if self.rank == 1 and self.position.step == 2:
            raise RuntimeError("injected on rank 1")
        original(self, micro_batches)

    Pretraining.train_step = train_step
    pretrain(config)


if __name__ == "__main__":
    sys.exit(run_main(main))
