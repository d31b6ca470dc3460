"""The server's side of the matching jobs.

Sites agree on a kernel, or use the one that they hold; every site brings its part of the gallery up
to date as masked rows with sealed labels; all of them consider what is asked; the server compares
rows and hands each site the best ones for its own queries. It learns similarities and opaque
handles, no label, no embedding, and not how any query was ranked.

A site that is lost is left out: its queries stay unanswered, its rows of a standing gallery stay.
What it is to forget it is told in the next job, see :mod:`.withdrawals`.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from nvflare.apis.fl_context import FLContext
from nvflare.apis.signal import Signal

from fedgestalt.contracts import MatchingStrategy
from fedgestalt.errors import PeerError, ServerError
from fedgestalt.federation.job.handshake import versions
from fedgestalt.federation.job.identity import Trust
from fedgestalt.federation.job.transfer import DownloadDesk, UploadDesk
from fedgestalt.federation.job.workflow import OnReply, PhasedWorkflow
from fedgestalt.federation.matching.agreement import Choice, KernelExchanges, Member, choose
from fedgestalt.federation.matching.galleries import (
    GALLERIES_FOLDER,
    Galleries,
    Gallery,
    Rows,
    absent,
    masked_rows,
)
from fedgestalt.federation.matching.messages import (
    GALLERY,
    MATCH,
    YARDSTICK_ROWS,
    Ask,
    Consent,
    Consider,
    Enrol,
    Enrolment,
    Handles,
    Holdings,
    MatchStart,
    Query,
    Ranked,
    ReleasedRows,
    SharedEnrolment,
    handles_digest,
    query_statement,
    withdrawal_statement,
)
from fedgestalt.federation.matching.parties import Parties
from fedgestalt.federation.matching.withdrawals import WITHDRAWALS_FILE, Withdrawals
from fedgestalt.federation.site.settings import ALL_ROWS
from fedgestalt.federation.tasks import (
    CONSIDER,
    ENROL,
    HOLDINGS,
    RANK,
    RANK_SHARES,
    START,
)
from fedgestalt.hooks import get_registry
from fedgestalt.messages import Message, from_site
from fedgestalt.similarity.gram import TopRows, dense_gram, similarities_of, top_rows

GRAM_FILE = "gram.npz"
_NOTHING = TopRows(np.empty((0, 0), np.int64), np.empty((0, 0), np.float32))


class FlakeSimilarityWorkflow(PhasedWorkflow):
    """Compares patients of different hospitals.

    Args:
        ensemble: digest of the published ensemble that every site encodes with.
        strategy: name of a matching strategy.
        ranking: name of a ranking strategy.
        purpose: ``match``, ``onboard`` or ``gallery``.
        kernel: ``session`` for one that ends with the job, ``standing`` for one that stays.
        rotate: agree on a new version of the standing kernel.
        sponsor: who hands the kernel to newcomers; empty for any site that holds it.
        computing_sites: beside the server, where a strategy has several computing parties; empty
            for the first sites of the roster.
        released_rows: best rows per query that the asking site gets; 0 releases all, which sites
            allow for evaluations only.
        yardstick_subjects: own diagnosed patients with whose nearest rows a site measures what is
            near; 0 for none.
        hpo_weight: of HPO terms beside faces, where sites release them.
        keep_gram: leave the whole matrix in the run folder, to show what the server sees.
        minimum_sites: with fewer the job does not go on.
        sites: see :class:`PhasedWorkflow`.
        phase_limit_seconds: see :class:`PhasedWorkflow`.
        start_limit_seconds: see :class:`PhasedWorkflow`.
        silence_limit_seconds: see :class:`PhasedWorkflow`.
    """

    template: ClassVar[str] = MATCH

    def __init__(
        self,
        ensemble: str,
        strategy: str = "isometry",
        ranking: str = "nearest-image",
        purpose: str = MATCH,
        kernel: str = "session",
        rotate: bool = False,
        sponsor: str = "",
        computing_sites: list[str] | None = None,
        released_rows: int = 200,
        yardstick_subjects: int = 99,
        hpo_weight: float = 0.0,
        keep_gram: bool = False,
        minimum_sites: int = 3,
        sites: list[str] | None = None,
        phase_limit_seconds: float = 3600.0,
        start_limit_seconds: float = 120.0,
        silence_limit_seconds: float = 30.0,
    ) -> None:
        super().__init__(sites, phase_limit_seconds, start_limit_seconds, silence_limit_seconds)
        self._ensemble, self._strategy, self._purpose = ensemble, strategy, purpose
        self._standing, self._rotate, self._sponsor = kernel == "standing", rotate, sponsor
        self._ranking, self._computing = ranking, tuple(computing_sites or ())
        self._released_rows, self._keep_gram = released_rows, keep_gram
        self._yardstick, self._hpo_weight = yardstick_subjects, float(hpo_weight)
        self._minimum = minimum_sites
        self._members: dict[str, Member] = {}
        self.here: set[str] = set()
        self._lost: set[str] = set()

    def start_controller(self, fl_ctx: FLContext) -> None:
        """See :class:`PhasedWorkflow`; the sites' identities are checked here, too."""
        super().start_controller(fl_ctx)
        workspace = fl_ctx.get_engine().get_workspace()
        root = Path(workspace.get_root_dir())
        self._galleries = Galleries(root / GALLERIES_FOLDER)
        kept = root / WITHDRAWALS_FILE if self._standing else None
        self._withdrawals = Withdrawals(kept, fl_ctx.get_job_id())
        self._uploads = UploadDesk(self.folder / "uploads")
        self._downloads = DownloadDesk()
        self._uploads.register(fl_ctx.get_engine())
        self._downloads.register(fl_ctx.get_engine())
        startup = Path(workspace.get_startup_kit_dir())
        provisioned = (startup / "rootCA.pem").exists()
        self._trust = Trust.from_kit(startup) if provisioned else Trust.of_anybody()

    def goes_on_without(self, lost: Collection[str]) -> bool:
        """As long as there are enough sites."""
        return len(self.roster) - len(lost) >= self._minimum

    def run(self, abort_signal: Signal, fl_ctx: FLContext) -> dict[str, Any]:
        """Match; see the module docstring."""
        self._job = fl_ctx.get_job_id()

        self._call = abort_signal, fl_ctx
        strategy: MatchingStrategy = get_registry().matching.get(self._strategy)
        self.check_strategy(strategy)
        self._join_all(abort_signal, fl_ctx)
        kernel, version = self._settle()
        return {
            "kernel": kernel,
            "kernel_version": version,
            "ensemble": self._ensemble,
            **self.compare(kernel, strategy),
            "lost": sorted(self._lost),
            "privacy": self.privacy(strategy),
        }

    def check_strategy(self, strategy: MatchingStrategy) -> None:
        """Raise FedgestaltError if such a job cannot compare by ``strategy``."""

    def compare(self, kernel: str, strategy: MatchingStrategy) -> dict[str, Any]:
        """Compare what the sites send under an agreed kernel; returns facts for the outcome."""
        if len(strategy.roles) > 1:
            found = self._match_shares(kernel, strategy)
        else:
            found = self._match_rows(kernel, strategy)
        return {**found, "ranking": self._ranking}

    def privacy(self, strategy: MatchingStrategy) -> dict[str, str]:
        """What each party learns, for the outcome."""
        said = strategy.disclosure
        learns = said.asking_site_learns
        if self._yardstick:
            learns += (
                f" The same about up to {self._yardstick} images of its own diagnosed patients"
                f" (best {YARDSTICK_ROWS} rows where rows are released)."
            )
        if self._hpo_weight or self._standing:
            learns += " HPO terms of released rows, where their hospitals allow it."
        return {
            "strategy": strategy.name,
            "server_learns": said.server_learns,
            "sites_learn": said.sites_learn,
            "asking_site_learns": learns,
        }

    def ask(
        self,
        task: str,
        messages: Message | Mapping[str, Message],
        on_reply: OnReply,
        sites: Collection[str],
    ) -> Collection[str]:
        """Gather the replies of ``sites`` to a task; returns who was lost meanwhile.

        Raises:
            ServerError: too few sites are left.
        """
        lost = self.gather_present(task, messages, on_reply, *self._call, sites)
        self._lost |= set(lost)
        self.here -= set(lost)
        if not self.goes_on_without(self._lost):
            raise ServerError(
                f"{len(self.here)} sites are left, the job asks for {self._minimum}",
                where="job",
                remedy="bring the lost sites back",
            )
        return lost

    def _match_rows(self, kernel: str, strategy: MatchingStrategy) -> dict[str, Any]:
        """The server alone compares masked rows."""
        gallery = self._galleries.gallery(kernel) if self._standing else Gallery()
        self._remember(gallery)
        queries = self._enrol(kernel, gallery)
        self._consider(kernel, queries)
        rows = gallery.rows
        self._release(rows, kernel, queries)
        if self._standing:
            self._galleries.keep_only(kernel, self._for)
        if self._keep_gram:
            gram = dense_gram(rows.rows, rows.rows, similarities_of(strategy))
            np.savez(self.folder / GRAM_FILE, gram=gram, handles=rows.handles)
        return {
            "rows": len(rows),
            "dimensions": int(rows.rows.shape[1]),
            **self._taken_back(queries),
        }

    # the handshake

    def _join_all(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        start = MatchStart(
            self._purpose,
            self.roster,
            self._ensemble,
            self._strategy,
            self._ranking,
            self._released_rows,
            int(self._standing),
            self._yardstick,
            self._hpo_weight,
        )
        strategy = get_registry().matching.entry(self._strategy)
        present = self.join(START, start, lambda _: versions([strategy]), abort_signal, fl_ctx)
        now = dt.datetime.now(dt.UTC)
        for site, said in present.items():
            identity = self._trust.check(site, said.certificate, now)
            self._members[site] = Member(said.certificate, identity)
        self.here = set(present)
        self._lost = set(self.roster) - self.here

    # the kernel

    def _settle(self) -> tuple[str, int]:
        """The kernel that all sites hold from now on, and its version."""
        holdings: dict[str, Holdings] = {}

        def on_reply(site: str, fields: object) -> None:
            holdings[site] = Holdings.from_fields(fields, from_site(site))

        self.ask(HOLDINGS, Ask(), on_reply, set(self.here))
        layouts = {said.layout: site for site, said in sorted(holdings.items()) if said.layout}
        if len(layouts) != 1:
            raise ServerError(
                f"{len(layouts)} layouts of encodings, not one: no site holds the ensemble, or the"
                " sites' plugins differ",
                where="kernel",
            )
        (layout,) = layouts
        exchanges = self._exchanges = KernelExchanges(
            self._job,
            self._ensemble,
            self._strategy,
            self.ask,
            self._members,
            self._uploads,
            self._downloads,
        )
        known = self._galleries.known(self._for) if self._standing else {}
        choice = choose(holdings if self._standing else {}, known, self._rotate)
        if choice.kernel:
            kernel = choice.kernel
            self._hand_over(exchanges, choice, holdings, layout)
        else:
            lacking = [site for site, said in holdings.items() if not said.has_ensemble]
            if lacking:
                raise PeerError(
                    "it does not hold the ensemble, and no kernel is there to hand over yet",
                    site=lacking[0],
                    remedy="run a matching job with a standing kernel first, then onboard it",
                )
            kernel = exchanges.agree(self.here, choice.version, layout, self._minimum)
        self._settled = choice.version, layout
        self._computing = self._choose_computing(kernel)
        if self._standing:
            self._galleries.begin(kernel, self._for, choice.version, self._computing)
        return kernel, choice.version

    def _hand_over(
        self,
        exchanges: KernelExchanges,
        choice: Choice,
        holdings: Mapping[str, Holdings],
        layout: str,
    ) -> None:
        newcomers = {site for site in self.here if site not in choice.holders}
        if not newcomers:
            return
        able = [s for s in choice.holders if s in self.here and holdings[s].has_ensemble]
        sponsor = self._sponsor or (able or [""])[0]
        if sponsor not in able:
            raise ServerError(
                f"no site can hand the kernel to {', '.join(sorted(newcomers))}: sponsor"
                f" {sponsor!r} does not hold it",
                where="kernel",
                remedy=f"name one of {', '.join(able) or 'the sites that hold it'}",
            )
        lacking = [site for site in newcomers if not holdings[site].has_ensemble]
        exchanges.hand_over(choice, newcomers, sponsor, layout, lacking)

    @property
    def _for(self) -> dict[str, str]:
        return {"ensemble": self._ensemble, "strategy": self._strategy}

    # the gallery

    def _enrol(self, kernel: str, gallery: Gallery) -> dict[str, Enrolment]:
        """Everybody's part is up to date; returns what came, by site."""
        enrolled: dict[str, Enrolment] = {}

        def on_reply(site: str, fields: object) -> None:
            fault = from_site(site)
            new = Enrolment.from_fields(fields, fault)
            new.check(fault)
            if new.kernel != kernel:
                raise PeerError(f"it enrolled under kernel {new.kernel}, not {kernel}", site=site)
            self._take_back(site, new, kernel, gallery)
            gallery.enrol(site, new.removed, masked_rows(new.rows, new.handles, new.labels))
            if (gallery.part(site).at(new.asked) < 0).any():
                raise PeerError("it asks about a row that it has not enrolled", site=site)
            self._check_query(kernel, site, new.asked, new.signature)
            enrolled[site] = new

        asks = int(self._purpose != GALLERY)
        messages = {
            site: Enrol(kernel, gallery.part(site).handles, asks) for site in sorted(self.here)
        }
        self.ask(ENROL, messages, on_reply, set(self.here))
        if not len(gallery.rows):
            raise ServerError("the gallery is empty: no site has enrolled an image", where="job")
        return enrolled

    def _remember(self, gallery: Gallery) -> None:
        """Open withdrawals, and who may have got rows when the next one comes."""
        if self._standing:
            self._withdrawals.take_part({*self.roster, *gallery.sites})

    def _take_back(
        self, site: str, new: Enrolment | SharedEnrolment, kernel: str, gallery: Gallery
    ) -> None:
        """Write down what a site takes back, before its rows leave this gallery and all others.

        Raises:
            PeerError: it removes what is not its own, or what the others are not to hear of.
        """
        if (gallery.part(site).at(new.removed) < 0).any():
            raise PeerError("it removes rows that it does not have in the gallery", site=site)
        others = [gallery.part(s) for s in gallery.sites if s != site and len(new.withdrawn)]
        if any((part.at(new.withdrawn) >= 0).any() for part in others):
            raise PeerError("it withdraws rows of another site", site=site)
        if len(absent(new.removed, new.withdrawn)):
            raise PeerError("it removes rows of which the others are not to hear", site=site)
        fresh = self._withdrawals.add(site, new.withdrawn)
        self._galleries.withdraw(site, fresh, kernel)

    def _taken_back(
        self, enrolled: Mapping[str, Enrolment] | Mapping[str, SharedEnrolment]
    ) -> dict[str, Any]:
        """How many rows went in this job, and who has not signed something yet."""
        removed = sum(len(new.removed) for new in enrolled.values())
        return {"withdrawn": removed, "not_signed": self._withdrawals.awaited}

    def _consider(
        self, kernel: str, queries: Mapping[str, Enrolment] | Mapping[str, SharedEnrolment]
    ) -> None:
        """Every site agrees to what is asked, and signs what it has forgotten."""
        withdrawals, here = self._withdrawals, set(self.here)
        shown = {site: withdrawals.unsigned(site) for site in here}

        def on_reply(site: str, fields: object) -> None:
            signatures = Consent.from_fields(fields, from_site(site)).signatures
            if signatures.keys() != shown[site].keys():
                raise PeerError("it signs other withdrawals than it was shown", site=site)
            member = self._members[site]
            for name, signature in signatures.items():
                statement = withdrawal_statement(site, bytes.fromhex(name))
                member.identity.verify(statement, signature)
            withdrawals.sign(site, signatures, member.certificate)

        asked = {
            site: Query(len(new.asked), handles_digest(new.asked), new.signature)
            for site, new in queries.items()
        }
        certificates = {site: self._members[site].certificate for site in asked}
        messages = {site: Consider(kernel, asked, shown[site], certificates) for site in here}
        self.ask(CONSIDER, messages, on_reply, here)

    def _release(self, rows: Rows, kernel: str, queries: Mapping[str, Enrolment]) -> None:
        similarities = similarities_of(get_registry().matching.get(self._strategy))
        count = len(rows) if self._released_rows == ALL_ROWS else self._released_rows
        released = {}

        def best(handles: Handles, most: int) -> TopRows:
            asked = rows.rows[rows.at(handles)]
            return top_rows(asked, rows.rows, most, similarities) if len(asked) else _NOTHING

        for site in sorted(self.here):
            found = best(queries[site].queries, count)
            typical = best(queries[site].yardstick, min(count, YARDSTICK_ROWS))
            named = np.union1d(found.rows, typical.rows)
            released[site] = ReleasedRows(
                rows.handles[named],
                rows.labels[named],
                np.searchsorted(named, found.rows).astype(np.int32),
                found.scores,
                np.searchsorted(named, typical.rows).astype(np.int32),
                typical.scores,
                self._withdrawals.receipts(site),
            )
        self.ask(RANK, released, self._on_ranked(kernel), set(self.here))

    def _on_ranked(self, kernel: str) -> OnReply:
        def on_ranked(site: str, fields: object) -> None:
            if Ranked.from_fields(fields, from_site(site)).kernel != kernel:
                raise PeerError("it ranked under another kernel", site=site)
            self._withdrawals.close(site)

        return on_ranked

    # shares, where several parties compute

    def _match_shares(self, kernel: str, strategy: MatchingStrategy) -> dict[str, Any]:
        """The server is one of several parties, of which none sees a score."""
        gallery = self._galleries.gallery(kernel) if self._standing else Gallery()
        parties = Parties(strategy, kernel, self._computing, gallery, self.ask)
        keys = self._exchanges.meet(self.here, kernel, *self._settled, self._minimum)

        def accept(site: str, new: SharedEnrolment) -> None:
            self._check_query(kernel, site, new.asked, new.signature)
            self._take_back(site, new, kernel, gallery)

        self._remember(gallery)
        if self._standing:
            parties.compare_holdings()
        enrolled = parties.enrol(
            keys,
            set(self.here),
            self._purpose != GALLERY,
            accept,
        )
        self._consider(kernel, enrolled)
        answers = parties.compute()
        released = {
            site: answers(site, self._withdrawals.receipts(site)) for site in sorted(self.here)
        }
        self.ask(RANK_SHARES, released, self._on_ranked(kernel), set(self.here))
        if self._standing:
            self._galleries.keep_only(kernel, self._for)
        return {
            "rows": parties.rows,
            **self._taken_back(enrolled),
            "computing": list(self._computing),
            "re_enrolled": parties.re_enrolled,
            "left_out": parties.left_out,
        }

    def _choose_computing(self, kernel: str) -> tuple[str, ...]:
        """The computing sites: those that hold the gallery's shares, or those of the job.

        Raises:
            ServerError: one is not there, or the job names others than those that hold shares.
        """
        count = len(get_registry().matching.get(self._strategy).roles) - 1
        kept = self._galleries.computing(kernel) if self._standing else ()
        if kept and self._computing and set(kept) != set(self._computing):
            raise ServerError(
                f"the shares of the standing gallery are with {', '.join(kept)}",
                where="job",
                remedy="name these as computing_sites, or submit the job with rotate=true, so that"
                " all sites enrol again with others",
            )
        chosen = kept or self._computing or tuple(sorted(self.here)[:count])
        lacking = sorted(set(chosen) - self.here)
        if count and lacking:
            raise ServerError(
                f"computing site {', '.join(lacking)} is not there",
                where="job",
                remedy="bring it back; to go on without it, submit the job with rotate=true and"
                " other computing_sites, so that all sites enrol again",
            )
        return chosen if count else ()

    def _check_query(self, kernel: str, site: str, queries: Handles, signature: bytes) -> None:
        """Raise PeerError if a site has not signed what it asks."""
        digest = handles_digest(queries)
        statement = query_statement(self._job, kernel, site, len(queries), digest)
        self._members[site].identity.verify(statement, signature)
