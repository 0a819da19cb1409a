"""``fusekern VERB``: one function a verb, each a thin shell around the engine.

The verbs import what they need when they run, so that ``fusekern info`` works without the packages of ``fusekern[seg]``
and ``fusekern --help`` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fusekern._version import __version__
from fusekern.errors import FusekernError, did_you_mean

HELP = """usage: fusekern VERB ... [--help] | --version

  train RECIPE                      train a segmenter into a run folder
  eval RUN|CHECKPOINT               mIoU, per-class table, confusion matrix
  predict RUN|CHECKPOINT INPUT      label PNGs and overlays of an image or a folder of images
  check-data RECIPE|YAML            find bad files before they cost a training run
  flops RECIPE                      multiply-accumulates and parameters, part by part
  info                              versions, what is built, which backend each op gets and why not another

RECIPE is a name (fusekern train --help lists them) or a YAML file; any key of it is an option: --train.steps 1000"""


def train(argv: Sequence[str]) -> None:
    from fusekern import recipes
    from fusekern.engine.train import train as run

    parser = recipes.recipe_parser(
        prog="fusekern train",
        usage="fusekern train RECIPE [--out DIR] [--resume auto|CHECKPOINT] [--init FILE] [--KEY VALUE ...]",
    )
    parser.add_argument("--out", metavar="DIR", help="run folder; default: runs/ and the recipe's name")
    parser.add_argument("--resume", metavar="auto|CHECKPOINT", help="go on from the run's last checkpoint, or this one")
    parser.add_argument("--init", metavar="FILE", help="start from the weights of a safetensors file or checkpoint")
    parser.add_argument("--print_config", action="store_true", help="print the resolved recipe and stop")
    options, recipe = recipes.parse(parser, [word for word in argv if word != "--print_config"])
    if "--print_config" in argv:
        print(recipes.dump(recipe), end="")
        return
    name = options.recipe if options.recipe in recipes.names() else Path(options.recipe).stem
    run(recipe, out=options.out or Path("runs") / name, resume=options.resume, init=options.init)


def evaluate(argv: Sequence[str]) -> None:
    from fusekern import recipes
    from fusekern.engine.evaluate import evaluate_checkpoint

    parser = recipes.eval_parser(
        prog="fusekern eval",
        usage="fusekern eval RUN|CHECKPOINT [--out DIR] [--split train|val] [--baseline] [--eval.KEY VALUE ...]",
    )
    parser.add_argument("--data.dataset", metavar="NAME|YAML", help="another data set with the same classes")
    parser.add_argument("--data.root", metavar="DIR", help="folder of the data, if it is not where training found it")
    parser.add_argument(
        "--out", metavar="DIR", help="folder of the report; default: eval/ in the run or checkpoint, or eval-DATASET"
    )
    parser.add_argument("--split", choices=["train", "val"], default="val", help="split of the data set")
    parser.add_argument("--baseline", action="store_true", help="also score a classifier that sees only colour")
    options, config = _parse_eval(parser, argv)
    evaluate_checkpoint(
        options.checkpoint,
        config=config,
        root=options.data.root,
        out=options.out and Path(options.out),
        split=options.split,
        baseline=options.baseline,
        dataset=options.data.dataset,
    )


def predict(argv: Sequence[str]) -> None:
    from fusekern import recipes
    from fusekern.engine.predict import predict as run

    parser = recipes.eval_parser(
        prog="fusekern predict", usage="fusekern predict RUN|CHECKPOINT INPUT --out DIR [--eval.KEY VALUE ...]"
    )
    parser.add_argument("input", metavar="INPUT", help="an image, or a folder of images")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for labels/ and overlays/")
    options, config = _parse_eval(parser, argv)
    written = run(options.checkpoint, options.input, Path(options.out), config=config)
    print(f"{len(written)} label PNGs in {Path(options.out) / 'labels'}, overlays in {Path(options.out) / 'overlays'}")


def check_data(argv: Sequence[str]) -> None:
    from fusekern import recipes
    from fusekern.data.check import check_data as check
    from fusekern.data.check import render
    from fusekern.data.scenes import ensure_built_in
    from fusekern.data.spec import built_in_datasets, load_spec

    parser = argparse.ArgumentParser(prog="fusekern check-data", description="Look at every file of a data set.")
    parser.add_argument("data", metavar="RECIPE|YAML", help="a recipe, a built-in data set, or the YAML of a data set")
    parser.add_argument("--data.root", dest="root", metavar="DIR", help="folder of the data")
    parser.add_argument(
        "--out", metavar="PNG", type=Path, default=Path("check-data.png"), help="contact sheet of overlays"
    )
    options = parser.parse_args(argv)
    if options.data not in built_in_datasets():
        if recipes.is_recipe(options.data):
            data = recipes.load(options.data).data
            options.data, options.root = data.dataset, options.root or data.root
        elif not Path(options.data).is_file():
            known = [*recipes.names(), *built_in_datasets()]
            raise FusekernError(
                f"{options.data!r} is no YAML file, no recipe and no built-in data set"
                + (did_you_mean(options.data, known) or f": {', '.join(known)}")
            )
    ensure_built_in(options.data, options.root)
    report = check(load_spec(options.data), options.root, options.out)
    print(render(report))
    if not report["ok"]:
        raise FusekernError("the data set has bad files, listed above")


def flops(argv: Sequence[str]) -> None:
    from fusekern import recipes
    from fusekern.engine.flops import count_flops, render

    parser = recipes.recipe_parser(
        prog="fusekern flops",
        usage="fusekern flops RECIPE [--size PIXELS | --size '[H, W]'] [--json] [--KEY VALUE ...]",
    )
    parser.add_argument(
        "--size", type=int | tuple[int, int], default=512, help="side, or height and width, of the image"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options, recipe = recipes.parse(parser, argv)
    size = options.size if isinstance(options.size, tuple) else (options.size, options.size)
    report = count_flops(recipe, size)
    print(json.dumps(report, indent=2) if options.json else render(report))


def info(argv: Sequence[str]) -> None:
    from fusekern.info import collect, render

    parser = argparse.ArgumentParser(prog="fusekern info", description="Versions, what is built, each op's backends.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse_args(argv).json
    found = collect()
    print(json.dumps(found, indent=2) if as_json else render(found))


def _parse_eval(parser, argv: Sequence[str]):
    from fusekern import recipes
    from fusekern.engine.checkpoint import read_recipe

    checkpoint = recipes.parse_options(parser, argv).checkpoint
    return recipes.parse_eval(parser, argv, read_recipe(checkpoint))


VERBS = {
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "check-data": check_data,
    "flops": flops,
    "info": info,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns 0; 2 after bad input, whose message goes to standard error; 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(HELP)
        elif argv[0] == "--version":
            print(f"fusekern {__version__}")
        elif argv[0] not in VERBS:
            raise FusekernError(f"unknown verb {argv[0]!r}{did_you_mean(argv[0], VERBS) or chr(10) * 2 + HELP}")
        else:
            VERBS[argv[0]](argv[1:])
        sys.stdout.flush()
    except FusekernError as error:
        print(f"fusekern: error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"fusekern: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fusekern: stopped at once; what was not saved is lost", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name.startswith("fusekern"):
            raise
        print(f"fusekern: error: {error}; this verb needs: pip install 'fusekern[seg]'", file=sys.stderr)
        return 2
    return 0 if argv else 2
