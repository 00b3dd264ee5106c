"""The page as an ASGI app: every request reads the folders again, and none writes."""

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hafl_app.dashboard import charts
from hafl_app.dashboard.fleet import fleet, note
from hafl_app.dashboard.folders import FolderError, Root
from hafl_app.dashboard.records import read_json
from hafl_app.dashboard.runs import PHASES, Run, RunReader, phases_of
from hafl_app.deployment.presence import FLEET_FILE
from hafl_app.printable import printable
from hafl_app.run.run_list import RUNNING, STATES
from hafl_app.tracking.as_text import duration, megabytes
from hafl_app.tracking.details import IMPORTANCE

_HERE: Final = Path(__file__).parent
_MOST_COMPARED: Final = 14
_FIGURES_KEPT: Final = 64
_HEADERS: Final = {
    # Nothing but this server's own files runs or is loaded, whatever a name in a folder says.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def dashboard(root: Path, hosts: Sequence[str], fleet_file: Path | None = None) -> Starlette:
    """Return the page.

    Parameters
    ----------
    root
        Folder whose runs are shown.
    hosts
        Names under which it may be asked for; any other Host header is refused, so that no page of
        another server reads this one by a name that leads here.
    fleet_file
        What the fence writes (``--fleet``); None: each run's own ``logs/fleet.json``, if it has
        one.

    Raises
    ------
    hafl_app.dashboard.folders.FolderError
        If there is no such folder.
    """
    pages = _Pages(RunReader(Root(root)), fleet_file)
    return Starlette(
        routes=[
            Route("/", pages.index),
            Route("/run", pages.run),
            Route("/curves.svg", pages.curves),
            Route("/heat.svg", pages.heat),
            Mount("/static", StaticFiles(directory=_HERE / "static")),
        ],
        middleware=[
            Middleware(_WithHeaders),
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
        ],
        exception_handlers={HTTPException: pages.refused, FolderError: pages.missing},
    )


class _WithHeaders:
    """Adds the headers that every answer has."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)


class _Pages:
    """The answers; Starlette calls each in a thread of its own."""

    def __init__(self, reader: RunReader, fleet_file: Path | None) -> None:
        self._reader, self._fleet_file = reader, fleet_file
        self._templates = _templates()
        self._figures: dict[tuple[Any, ...], bytes] = {}
        self._drawing = threading.Lock()

    # ---- pages -----------------------------------------------------------------------------

    def index(self, request: Request) -> Response:
        """Answer with the table of runs, and the curves of the chosen ones."""
        asked = request.query_params
        words, state = asked.get("q", ""), asked.get("state", "")
        runs = self._reader.all()
        shown = [run for run in runs if _fits(run, words, state)]
        chosen = [run for run in runs if run.name in set(asked.getlist("run"))][:_MOST_COMPARED]
        phases = phases_of(chosen)
        phase = _one_of(asked.get("phase"), phases)
        return self._html(
            "index.html",
            runs=shown,
            total=len(runs),
            counts={s: sum(run.state == s for run in runs) for s in STATES},
            words=words,
            state=state,
            states=STATES,
            chosen=chosen,
            phases=phases,
            phase=phase,
            curves=_curves_url(chosen, phase) if chosen and phase else "",
        )

    def run(self, request: Request) -> Response:
        """Answer with all of one run."""
        run, asked = self._asked_run(request), request.query_params
        phases = phases_of([run])
        phase = _one_of(asked.get("phase"), phases)
        heats = [*charts.QUANTITIES] if run.trainings else []
        heats = [IMPORTANCE, *heats] if run.importance else heats
        heat = _one_of(asked.get("heat"), heats)
        now = time.time()
        watched, fault = self._watched(run)
        return self._html(
            "run.html",
            run=run,
            faults=[*run.faults, *fault],
            phases=phases,
            phase=phase,
            curves=_curves_url([run], phase) if phase else "",
            heats=heats,
            heat=heat,
            titles={name: q.title for name, q in charts.QUANTITIES.items()},
            heat_map=_url("/heat.svg", run=run.name, heat=heat, v=run.version) if heat else "",
            nodes=fleet(run, watched, now),
            is_watched=bool(watched),
            note=note(watched, now) if run.state == RUNNING else "",
        )

    def _watched(self, run: Run) -> tuple[Mapping[str, Any], list[str]]:
        """Return what the fence says of the nodes, and why it cannot be read if so."""
        try:
            if self._fleet_file:
                own = Root(self._fleet_file.parent)
                return read_json(own, own.path / self._fleet_file.name), []
            file = self._reader.root.folder(run.name) / "logs" / FLEET_FILE
            return (read_json(self._reader.root, file), []) if file.exists() else ({}, [])
        except FolderError as error:
            return {}, [str(error)]

    # ---- figures ---------------------------------------------------------------------------

    def curves(self, request: Request) -> Response:
        """Answer with the curves of the runs that are asked for, as SVG."""
        names = request.query_params.getlist("run")[:_MOST_COMPARED]
        phase = request.query_params.get("phase", "")
        if not names or phase not in PHASES:
            raise HTTPException(404, "there is no such figure")
        runs = {name: self._reader.read(name) for name in names}
        key = ("curves", phase, *((name, run.version) for name, run in runs.items()))
        return self._svg(key, lambda: charts.curves(runs, phase))

    def heat(self, request: Request) -> Response:
        """Answer with a heat map of a run, as SVG."""
        run, heat = self._asked_run(request), request.query_params.get("heat", "")
        key = ("heat", run.name, run.version, heat)
        if heat == IMPORTANCE and run.importance:
            return self._svg(key, lambda: charts.importance_heat_map(run.importance[-1]))
        if heat in charts.QUANTITIES and run.trainings:
            return self._svg(key, lambda: charts.client_heat_map(run.trainings, heat))
        raise HTTPException(404, "there is no such figure")

    def _svg(self, key: tuple[Any, ...], draw: Callable[[], bytes]) -> Response:
        """Answer with a figure, one that was drawn before if nothing has changed."""
        with self._drawing:
            content = self._figures.pop(key, None) or draw()
            self._figures[key] = content
            if len(self._figures) > _FIGURES_KEPT:
                del self._figures[next(iter(self._figures))]  # not asked for the longest
        return Response(content, media_type="image/svg+xml")

    # ---- what is not there -----------------------------------------------------------------

    def refused(self, _request: Request, error: Exception) -> Response:
        """Answer what there is not, or not by this method."""
        assert isinstance(error, HTTPException)  # registered for no other
        return self._html("error.html", error.status_code, message=error.detail)

    def missing(self, _request: Request, error: Exception) -> Response:
        """Answer a run that is none of ours."""
        return self._html("error.html", 404, message=str(error))

    # ---- parts -----------------------------------------------------------------------------

    def _asked_run(self, request: Request) -> Run:
        return self._reader.read(request.query_params.get("run", ""))

    def _html(self, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        content = self._templates.get_template(template).render(values)
        return HTMLResponse(content, status)


def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        auto_reload=False,  # those of the code that runs, also after an update
        trim_blocks=True,
        lstrip_blocks=True,
        # What a folder says stays on its line, whatever characters are in it.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters |= {"megabytes": megabytes, "ago": _ago, "titled": _titled}
    environment.globals |= {"url": _url}
    return environment


def _ago(written: float) -> str:
    """Return how long ago a time was, in words."""
    age = time.time() - written
    if not math.isfinite(age):
        return "-"
    return f"{age / 86400:.0f} days ago" if age > 2 * 86400 else f"{duration(max(0.0, age))} ago"


def _titled(names: Sequence[str], titles: Mapping[str, str] | None = None) -> list[tuple[str, str]]:
    """Return names with their titles, themselves where they have none."""
    return [(name, (titles or {}).get(name, name)) for name in names]


def _url(path: str, **query: Any) -> Markup:
    """Return an address whose values are quoted; lists repeat their name."""
    given = {name: value for name, value in query.items() if value not in ("", None)}
    return Markup.escape(f"{path}?{urlencode(given, doseq=True)}" if given else path)


def _curves_url(runs: Sequence[Run], phase: str) -> Markup:
    versions = "-".join(run.version for run in runs)
    return _url("/curves.svg", run=[run.name for run in runs], phase=phase, v=versions)


def _fits(run: Run, words: str, state: str) -> bool:
    """Whether a run has all words, in its name or its settings, and the state if one is given."""
    text = " ".join(
        (run.name, run.label, run.method, run.data, run.model, f"seed={run.seed}")
    ).lower()
    return (not state or run.state == state) and all(w in text for w in words.lower().split())


def _one_of(asked: str | None, known: Sequence[str]) -> str:
    """Return what was asked for if it is known, else the first; empty if there is none."""
    return asked if asked and asked in known else next(iter(known), "")
