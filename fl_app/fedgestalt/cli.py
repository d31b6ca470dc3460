"""The ``fedgestalt`` command: results on standard output, progress and faults on standard error."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import BaseModel

from fedgestalt import RESEARCH_USE_ONLY, __version__
from fedgestalt.errors import ConfigError, FedgestaltError, PluginError

if TYPE_CHECKING:
    from fedgestalt.cohort import Cohort, FaceFinder
    from fedgestalt.console import Steps
    from fedgestalt.contracts import AlignedFace, Pixels, Preprocessor

WORK_FAILED, CALL_WRONG = 1, 2
_WRONG_CALLS = (ConfigError, PluginError)


class _Group(click.Group):
    """Turns errors into one sentence and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FedgestaltError as error:
            click.echo(f"fedgestalt: {error}", err=True)
            ctx.exit(CALL_WRONG if isinstance(error, _WRONG_CALLS) else WORK_FAILED)
        except KeyboardInterrupt:
            click.echo("fedgestalt: interrupted; nothing was left half-written.", err=True)
            ctx.exit(WORK_FAILED)
        except BrokenPipeError:
            sys.stderr.close()  # whoever read our output has gone: nothing to say, nobody to hear
            ctx.exit(WORK_FAILED)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            click.echo(f"fedgestalt: {where}{error.strerror or error}.", err=True)
            ctx.exit(WORK_FAILED)


def _as_json(content: object) -> None:
    click.echo(json.dumps(content, indent=1))


_json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document.")


@click.group(
    cls=_Group, epilog=RESEARCH_USE_ONLY, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, message="fedgestalt %(version)s")
@click.option("-v", "--verbose", is_flag=True, help="Log to standard error.")
def main(verbose: bool) -> None:
    """Hospitals match rare-disease faces together, on NVIDIA FLARE."""
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, stream=sys.stderr)


@main.command()
@click.option(
    "--cohort",
    default="synthetic",
    show_default=True,
    help="A cohort plugin's name, or a folder in GMDB layout.",
)
@click.option("--sites", default=3, show_default=True, help="Number of hospitals.")
@click.option(
    "--split",
    default="near-uniform",
    show_default=True,
    help="How subjects are dealt: near-uniform, non-overlapping or dirichlet.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=True),
    default=Path("build/demo"),
    show_default=True,
    help="Folder for result.json and report.html.",
)
@click.option("--seed", default=1, show_default=True, help="First seed.")
@click.option(
    "--seeds", default=1, show_default=True, help="Repeat with so many seeds; tables become means."
)
def demo(cohort: str, sites: int, split: str, out: Path, seed: int, seeds: int) -> None:
    """Run the main job: hospitals train and match on one machine, with a report."""
    from fedgestalt.console import Steps
    from fedgestalt.demo.run import DemoSettings, run_demo

    if seeds < 1 or seed < 0:
        raise ConfigError("--seeds must be 1 or more and --seed 0 or more")
    steps = Steps()
    chosen = tuple(range(seed, seed + seeds))
    result = run_demo(DemoSettings(cohort, sites, split, out, chosen), steps)
    steps.say()
    for mode, tables in result.evaluation.items():
        table = tables["frequent"]
        shares = "  ".join(f"top-{k} {getattr(table, f'top{k}'):6.1%}" for k in (1, 5, 10))
        steps.say(f"  {mode:12} {shares}")
    steps.say(
        f"\n[bold]{out / 'report.html'}[/bold] and result.json are ready. {RESEARCH_USE_ONLY}"
    )


@main.command()
@_json_option
def plugins(as_json: bool) -> None:
    """List the installed plugins, where they come from, and which were left out."""
    from fedgestalt.hooks import get_registry

    registry = get_registry()
    rows = [
        {
            "kind": entry.kind,
            "name": entry.plugin.name,
            "summary": entry.plugin.summary,
            "licence": entry.plugin.licence,
            "distribution": entry.distribution,
            "version": entry.version,
        }
        for entry in registry.entries()
    ]
    problems = [vars(problem) for problem in registry.problems]
    if as_json:
        _as_json({"plugins": rows, "problems": problems})
        return
    _table(rows, ("kind", "name", "distribution", "version", "licence", "summary"))
    for problem in registry.problems:
        said = f"{problem.plugin} of {problem.distribution} was left out: {problem.reason}"
        click.echo(f"fedgestalt: plugin {said}", err=True)


def _table(rows: list[dict[str, str]], columns: tuple[str, ...]) -> None:
    widths = {c: max([len(c), *(len(row[c]) for row in rows)]) for c in columns}
    for row in [{c: c.upper() for c in columns}, *rows]:
        click.echo("  ".join(row[c].ljust(widths[c]) for c in columns).rstrip())


_labels_option = click.option(
    "--labels",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="GMDB folder whose syndrome table and class list the consortium agreed on.",
)
_preprocessor_option = click.option(
    "--preprocessor", metavar="NAME", help="What finds faces; needed if several are installed."
)


@main.group()
def cohort() -> None:
    """Build, import, export, split and check cohorts."""


@cohort.command("build")
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def cohort_build(name: str, out: Path) -> None:
    """Build the cohort NAME that a plugin brings into the new folder OUT."""
    import shutil

    from fedgestalt.cohort import default_cache, materialise, read_cohort
    from fedgestalt.console import Steps
    from fedgestalt.hooks import get_registry

    source, steps = get_registry().cohorts.get(name), Steps()
    _refuse_existing(out)
    with steps.step("build", f"Building cohort {name}"):
        root = materialise(source, default_cache(), lambda d, t: steps.note(f"{d} of {t} images"))
        _write_folder(out, lambda partial: shutil.copytree(root, partial))
    _say_size(out, read_cohort(out, name=name))


@cohort.command("import")
@click.argument("table", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@_labels_option
@_preprocessor_option
@click.option(
    "--test-share",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Share of each syndrome's subjects to keep out of the gallery for tests.",
)
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True)
@click.option("--version", default="v1.0.0", show_default=True, help="Of the new files.")
def cohort_import(
    table: Path,
    out: Path,
    labels: Path | None,
    preprocessor: str | None,
    test_share: float,
    seed: int,
    version: str,
) -> None:
    """Make the new cohort folder OUT from TABLE, a CSV, and the photographs that it lists."""
    from fedgestalt.cohort import import_csv, read_cohort, read_label_map
    from fedgestalt.console import Steps

    _refuse_existing(out)
    agreed = read_label_map(labels) if labels else None
    steps = Steps()
    find_face = _face_finder(preprocessor, steps)
    with steps.step("import", f"Aligning the photographs of {table.name}"):
        _write_folder(
            out,
            lambda partial: import_csv(
                table,
                partial,
                lambda photograph: find_face(photograph).pixels,
                labels=agreed,
                version=version,
                test_share=test_share,
                seed=seed,
            ),
        )
    _say_size(out, read_cohort(out))


@cohort.command("export")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--version", help="Of the new files, such as v1.1.0; that of FOLDER by default.")
@click.option(
    "--encodings",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Encodings of its images (.npz or .csv) to go along as GMDB's CSV.",
)
def cohort_export(folder: Path, out: Path, version: str | None, encodings: Path | None) -> None:
    """Write the cohort in FOLDER as a complete GMDB tree into the new folder OUT."""
    from fedgestalt.cohort import export_cohort, read_cohort, read_encodings

    _refuse_existing(out)
    exported = read_cohort(folder)
    table = read_encodings(encodings) if encodings else None
    _write_folder(
        out, lambda partial: export_cohort(exported, partial, version=version, encodings=table)
    )
    _say_size(out, exported)


@cohort.command("split")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--sites", type=int, required=True, help="Number of silos, or more.")
@click.option("--strategy", default="near-uniform", show_default=True)
@click.option(
    "--alpha",
    type=float,
    default=0.5,
    show_default=True,
    help="For dirichlet: the smaller, the more unequal.",
)
@click.option("--seed", default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def cohort_split(
    folder: Path, sites: int, strategy: str, alpha: float, seed: int, out: Path
) -> None:
    """Deal the cohort in FOLDER to silos in the new folder OUT, by subject.

    OUT/split.svg shows who has what.
    """
    from fedgestalt.cohort import read_cohort, split_cohort, write_silos
    from fedgestalt.reporting.silos import write_split_picture

    _refuse_existing(out)
    names = [f"site-{number}" for number in range(1, sites + 1)]
    silos = split_cohort(read_cohort(folder), names, strategy, seed, alpha)
    write_silos(silos, out)
    how = strategy if strategy != "dirichlet" else f"{strategy}, alpha {alpha:g}"
    write_split_picture(out / "split.svg", silos, f"{how}, seed {seed}")
    for name, silo in silos.items():
        _say_size(out / name, silo)


@cohort.command("check")
@click.argument("source", metavar="FOLDER|TABLE.csv", type=click.Path(path_type=Path))
@_labels_option
@click.option("--faces", is_flag=True, help="Also look for the face in every aligned image.")
@_preprocessor_option
@_json_option
def cohort_check(
    source: Path, labels: Path | None, faces: bool, preprocessor: str | None, as_json: bool
) -> None:
    """Check a cohort before anything runs: a folder in GMDB layout, or a CSV with photographs.

    Subjects and images are not named: a finding says file and row.
    """
    from dataclasses import asdict

    from fedgestalt.cohort import check_cohort, check_table, counts_of, read_cohort, read_label_map
    from fedgestalt.cohort.phenotype import ontology_is_installed
    from fedgestalt.console import Steps

    agreed = read_label_map(labels) if labels else None
    counts, steps, is_table = None, Steps(), source.suffix == ".csv"
    find_face = _face_finder(preprocessor, steps) if faces or is_table else None
    with steps.step("check", f"Checking {source.name}"):
        if is_table and find_face:
            findings = check_table(source, find_face, labels=agreed)
        else:
            findings = check_cohort(source, labels=agreed, find_face=find_face)
    errors = [finding for finding in findings if finding.severity == "error"]
    if not is_table and not errors:
        counts = counts_of(read_cohort(source))
    left_out = [] if ontology_is_installed() else ["HPO terms (install fedgestalt[phenotype])"]
    if as_json:
        _as_json(
            {
                "findings": [asdict(finding) for finding in findings],
                "counts": asdict(counts) if counts else None,
                "not_checked": left_out,
                "ok": not errors,
            }
        )
    else:
        for f in findings:
            row = f", row {f.row}" if f.row else ""
            click.echo(f"{f.severity}: {f.file}{row}: {f.what}; {f.remedy}.")
        if counts:
            held = counts.images_per_syndrome
            click.echo(
                f"{counts.images} images of {counts.subjects} subjects,"
                f" {counts.syndromes} syndromes with {held[-1]} to {held[0]} images each"
            )
        for what in left_out:
            click.echo(f"not checked: {what}")
        click.echo(f"{len(errors)} errors, {len(findings) - len(errors)} warnings")
    if errors:
        sys.exit(WORK_FAILED)


@main.command()
@click.argument("encodings", type=click.Path(path_type=Path))
@click.option(
    "--cohort",
    "folder",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Folder in GMDB layout that the encodings are of.",
)
@click.option(
    "--strategy",
    metavar="NAME",
    help="Compare through this matching strategy, under a fresh mask; in the clear by default.",
)
@click.option(
    "--ranking",
    default="nearest-image",
    show_default=True,
    metavar="NAME",
    help="Ranking strategy.",
)
@click.option(
    "--hpo-weight",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    metavar="W",
    help="Weight of HPO terms beside the face, 0 to 1.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Of the intervals."
)
@_json_option
def evaluate(
    encodings: Path,
    folder: Path,
    strategy: str | None,
    ranking: str,
    hpo_weight: float,
    seed: int,
    as_json: bool,
) -> None:
    """Rank the test images of a cohort by their ENCODINGS (.npz or GMDB's .csv): four tables."""
    from rich.console import Console

    from fedgestalt.console import Steps
    from fedgestalt.evaluate import Request, evaluate_encodings, show

    request = Request(encodings, folder, strategy, ranking, hpo_weight, seed)
    document = evaluate_encodings(request, Steps())
    if as_json:
        _as_json(document)
    else:
        show(document, Console(highlight=False))


@main.command()
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    required=True,
    metavar="BUNDLE",
    help="A published model: folder or zip.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    required=True,
    metavar="PATH",
    help="A photograph, a folder of photographs, or a folder in GMDB layout.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="New file of encodings: .npz, or .csv as GestaltMatcher's tools read it.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option(
    "--preprocessor",
    metavar="NAME",
    help="Finds and aligns faces, the only one there is by default; photographs of 112 x 112 pixels"
    " count as aligned.",
)
@_json_option
def encode(
    model: Path, images: Path, out: Path, device: str, preprocessor: str | None, as_json: bool
) -> None:
    """Encode photographs with a published model, offline.

    Photographs without a usable face are named and left out; the exit code is 1 then. Several
    processes share the work: torchrun --standalone --nproc-per-node N -m fedgestalt encode ...
    """
    from fedgestalt.console import Steps
    from fedgestalt.encode import Request, encode_photographs
    from fedgestalt.hooks import get_registry
    from fedgestalt.learning.crew import join_crew

    request = Request(model, images, out, _preprocessor(preprocessor), device)
    with join_crew() as crew:
        document = encode_photographs(request, get_registry(), Steps(), crew)
    if not crew.leads:
        return
    if as_json:
        _as_json(document)
    else:
        click.echo(
            f"{out}: {document['encoded']} photographs encoded, {document['failed']} failed;"
            f" encodings identify people: keep them like the photographs. {RESEARCH_USE_ONLY}"
        )
    if document["failed"]:
        sys.exit(WORK_FAILED)


@main.group()
def bundle() -> None:
    """Publish a trained model as a MONAI Bundle."""


@bundle.command("export")
@click.argument("ensemble", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="BUNDLE",
    help="New folder, or new file that ends in .zip.",
)
@click.option(
    "--result",
    type=click.Path(path_type=Path, exists=True),
    metavar="DIR",
    help="Downloaded result of the training job, for rounds, sites and aggregation on the card.",
)
@click.option(
    "--cohort",
    "folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="Your own cohort: its version, digest and counts then stand on the card.",
)
@click.option(
    "--licence",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Licence of what was trained; the bundle says that none is stated otherwise.",
)
@click.option(
    "--frozen/--no-frozen",
    default=True,
    show_default=True,
    help="Take along what training did not change, where its licence allows to pass it on.",
)
@_json_option
def bundle_export(
    ensemble: Path,
    out: Path,
    result: Path | None,
    folder: Path | None,
    licence: Path | None,
    frozen: bool,
    as_json: bool,
) -> None:
    """Publish ENSEMBLE, a folder named by its digest in a site's store or a job's result."""
    from fedgestalt.publish import Request, publish

    document = publish(Request(ensemble, out, result, folder, licence, frozen))
    if as_json:
        _as_json(document)
        return
    for member, why in document["left_out"].items():
        click.echo(f"left out: frozen parts of {member}, because {why}")
    click.echo(f"{out}: model {document['model']}. {RESEARCH_USE_ONLY}")


def _face_finder(name: str | None, steps: Steps) -> FaceFinder:
    """Align by the preprocessor called ``name``, or by the only one there is."""
    import itertools

    preprocessor = _preprocessor(name)
    options, numbers = preprocessor.options(), itertools.count(1)

    def find(photograph: Pixels) -> AlignedFace:
        steps.note(f"photograph {next(numbers)}")
        return preprocessor.align(photograph, options)

    return find


def _preprocessor(name: str | None) -> Preprocessor:
    """The preprocessor called ``name``, or the only one there is."""
    from fedgestalt.hooks import get_registry

    catalogue = get_registry().preprocessors
    names = catalogue.names()
    if name is None and len(names) != 1:
        raise ConfigError(
            f"{len(names)} preprocessors are installed",
            remedy=f"name one with --preprocessor: {', '.join(names)}" if names else "install one",
        )
    return catalogue.get(name or names[0])


def _say_size(place: Path, held: Cohort) -> None:
    click.echo(f"{place}: {len(held.images)} images of {len(held.subjects)} subjects")


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise ConfigError("exists already", where=str(out), remedy="name a new folder")


def _write_folder(out: Path, write: Callable[[Path], object]) -> None:
    import shutil
    import tempfile

    out.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(dir=out.parent, prefix=".partial-"))
    try:
        write(holder / "content")
        (holder / "content").replace(out)
    finally:
        shutil.rmtree(holder, ignore_errors=True)


@main.command()
@click.option(
    "--startup-kit",
    type=click.Path(path_type=Path),
    metavar="KIT",
    help="FLARE startup kit of a site, a server or an administrator.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Cohort to check; that of the site's policy by default.",
)
@click.option(
    "--dry-run/--no-dry-run", default=True, show_default=True, help="Compute one batch of images."
)
@_json_option
def doctor(startup_kit: Path | None, data: Path | None, dry_run: bool, as_json: bool) -> None:
    """Say whether this site is ready: software, kit, network, policy, data, machine."""
    from rich.console import Console

    from fedgestalt.console import Steps
    from fedgestalt.doctor import Request, examine
    from fedgestalt.doctor.report import as_document, is_ready, show

    checks = examine(Request(startup_kit, data, dry_run), Steps())
    if as_json:
        _as_json(as_document(checks))
    else:
        show(checks, Console(highlight=False))
    if not is_ready(checks):
        sys.exit(WORK_FAILED)


@main.group()
def job() -> None:
    """List, render and explain the FLARE jobs that an administrator submits."""


@job.command("list")
@_json_option
def job_list(as_json: bool) -> None:
    """List the job templates."""
    from fedgestalt.jobs import JOBS, template_folder

    rows = [
        {"name": name, "summary": spec.summary, "folder": str(template_folder() / name)}
        for name, spec in JOBS.items()
    ]
    if as_json:
        _as_json({"templates": rows})
    else:
        _table(rows, ("name", "summary", "folder"))


@job.command("render")
@click.argument("template")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="For example rounds=10, ensemble.members.0.training.epochs=2 or preset=gestaltmatcher.",
)
def job_render(template: str, out: Path, settings: tuple[str, ...]) -> None:
    """Write TEMPLATE with your settings as a job folder that FLARE takes."""
    from fedgestalt.hooks import get_registry
    from fedgestalt.jobs import MatchingJob, check_plugins, job_class, render_job, with_settings

    pairs = [item.partition("=") for item in settings]
    wrong = [key for key, sign, _ in pairs if not (key and sign)]
    if wrong:
        raise ConfigError(f"--set {wrong[0]!r} is not KEY=VALUE")
    spec = with_settings(job_class(template)(), {key: value for key, _, value in pairs})
    if isinstance(spec, MatchingJob) and not spec.ensemble:
        raise ConfigError(
            "a matching job needs the digest of a published ensemble",
            remedy="add --set ensemble=DIGEST (the training job's outcome.json names it)",
        )
    check_plugins(spec, get_registry())
    render_job(spec, out, out.resolve().name)
    click.echo(f"{out}: submit it with `nvflare job submit -j {out}`")


@job.command("explain")
@click.argument("folder", type=click.Path(path_type=Path))
@_json_option
def job_explain(folder: Path, as_json: bool) -> None:
    """Say what the job in FOLDER would do."""
    from fedgestalt.jobs import read_job

    spec = read_job(folder)
    fields = spec.model_dump(mode="json")
    if as_json:
        _as_json({"template": spec.template, "summary": spec.summary, "settings": fields})
        return
    click.echo(f"{spec.template}: {spec.summary}")
    for line in _settings(spec):
        click.echo(f"  {line}")
    click.echo(RESEARCH_USE_ONLY)


def _settings(spec: BaseModel, prefix: str = "") -> Iterator[str]:
    """Key by key, as ``job render --set`` takes them, with what each means."""
    fields = spec.model_dump(mode="json")
    for name, info in type(spec).model_fields.items():
        value = getattr(spec, name)
        parts = {name: value}
        if isinstance(value, tuple):
            parts = {f"{name}.{index}": item for index, item in enumerate(value)}
        if parts and all(isinstance(part, BaseModel) for part in parts.values()):
            for key, part in parts.items():
                yield from _settings(part, f"{prefix}{key}.")
        else:
            said = f"   # {info.description}" if info.description else ""
            yield f"{prefix}{name} = {json.dumps(fields[name])}{said}"


@job.command("watch")
@click.argument("kit", type=click.Path(path_type=Path))
@click.argument("job_id")
@click.option(
    "--download",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep the job's result in this folder.",
)
@_json_option
def job_watch(kit: Path, job_id: str, download: Path | None, as_json: bool) -> None:
    """Follow a job to its end, with the administrator's startup KIT.

    JOB_ID is what FLARE printed when the job was submitted, or "latest".
    """
    import tempfile

    from rich.console import Console

    from fedgestalt.federation.operations.admin import AdminSession, read_outcome
    from fedgestalt.federation.operations.view import JobView

    with AdminSession(kit) as session, tempfile.TemporaryDirectory() as scratch:
        job_id = session.latest_job() if job_id == "latest" else job_id
        wanted = session.wanted_sites(job_id)
        console = Console(stderr=True, highlight=False)
        with JobView(job_id, console, wanted) as view:
            status = session.watch(
                job_id,
                lambda now, report: view.show(
                    now, report, [] if now == "RUNNING" else session.connected_sites()
                ),
            )
        result = session.download(job_id, download or Path(scratch))
        outcome = read_outcome(result) or {"reason": session.reason(job_id, result)}
    said = {"job": job_id, "flare_status": status, **outcome}
    done = outcome.get("status") == "completed"
    if as_json:
        _as_json(said | ({"result": str(result)} if download else {}))
    else:
        _tell_outcome(said, result if download else None)
    if not done:
        sys.exit(WORK_FAILED)


@job.command("verify")
@click.argument("result", type=click.Path(path_type=Path))
@click.option(
    "--root-ca",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    required=True,
    help="The consortium's root certificate: rootCA.pem of any startup kit.",
)
@_json_option
def job_verify(result: Path, root_ca: Path, as_json: bool) -> None:
    """Check the signed transcript of a training job, offline.

    RESULT is the job's downloaded result, or its transcript.json.
    """
    from fedgestalt.federation.training.transcript import check_transcript, find_transcript

    rounds = check_transcript(find_transcript(result), root_ca.read_bytes())
    rows = [
        {
            "round": str(checked.record["round"]),
            "job": str(checked.record["job"]),
            "sites": f"{len(checked.record['survivors'])} of {len(checked.record['roster'])}",
            "threshold": str(checked.record["threshold"]),
            "signed by": ", ".join(checked.signers),
            "model": str(checked.record["model_after"])[:12],
        }
        for checked in rounds
    ]
    if as_json:
        _as_json(
            {"ok": True, "rounds": [{**c.record, "signed_by": list(c.signers)} for c in rounds]}
        )
        return
    _table(rows, ("round", "job", "sites", "threshold", "signed by", "model"))
    click.echo(
        f"{len(rounds)} rounds hold: each was signed by its threshold, under certificates of this"
        " root, and follows the one before."
    )
    click.echo(RESEARCH_USE_ONLY)


def _tell_outcome(said: dict[str, Any], result: Path | None) -> None:
    state = said.get("status", "ended without an outcome")
    click.echo(f"job {said['job']}: {state} ({said['flare_status']})")
    if said.get("reason"):
        click.echo(f"reason: {said['reason']}")
    for warning in said.get("warnings", ()):
        click.echo(f"warning: {warning}")
    if said.get("labels_judged") is False:
        click.echo("labels: the model is not good enough yet to notice a site with wrong labels")
    if "ensemble" in said:
        click.echo(f"ensemble: {said['ensemble']}")
    if "kernel" in said:
        click.echo(f"kernel: {said['kernel']}; the ranks lie at the sites")
    if result:
        click.echo(f"result: {result}")
    click.echo(RESEARCH_USE_ONLY)


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("build/consortium"),
    show_default=True,
    help="Folder for kits, data and results; it is made anew.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Rounds of each training job.",
)
def consortium(out: Path, rounds: int) -> None:
    """Rehearse a real consortium on this machine: provision, train, match, add a hospital."""
    from fedgestalt.console import Steps
    from fedgestalt.demo.consortium import rehearse

    steps = Steps()
    for line in rehearse(out, rounds, steps):
        steps.say(line)
    steps.say(f"\n[bold]{out}[/bold] holds kits, jobs and results. {RESEARCH_USE_ONLY}")


@main.command()
def version() -> None:
    """Print the version."""
    click.echo(__version__)
