"""The daemon's life, from top to bottom: start, serve, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rootstock_client import ipi
from rootstock_client.errors import DrainingError, RootstockError, UnknownModelError
from rootstock_client.runtime_dir import job_runtime_dir
from rootstockd import address
from rootstockd.control.api import control_server
from rootstockd.control.limits import MAX_SCRAPERS
from rootstockd.control.metrics import metrics_server
from rootstockd.control.schema import ReloadReport
from rootstockd.fleet.fleet import Fleet
from rootstockd.fleet.warm_model import WorkerKey
from rootstockd.host.descriptors import raise_descriptor_limit, share_descriptors
from rootstockd.host.devices import found_devices
from rootstockd.host.log_file import reopen_log
from rootstockd.host.peers import peer_of
from rootstockd.host.sockets import claim_gpu, listen_tcp, url_of
from rootstockd.host.starter import outlive_it
from rootstockd.host.surroundings import closed_folder, one_thread
from rootstockd.models.availability import not_to_preload
from rootstockd.models.catalogue import Catalogue, CatalogueError
from rootstockd.notices import Notices
from rootstockd.offer import Offer
from rootstockd.processes.folders import remove_left_behind
from rootstockd.reload import Files, read_files
from rootstockd.sessions.acceptor import Acceptor
from rootstockd.sessions.accounts import Account, Accounts
from rootstockd.sessions.init_request import InitRequest
from rootstockd.sessions.registry import SessionRegistry
from rootstockd.sessions.session import LINGER, Session, stopping_error
from rootstockd.settings.config import Config
from rootstockd.settings.config_file import ConfigError, reloadable
from rootstockd.settings.config_layers import changes, take_over
from rootstockd.supervision.supervisor import Supervisor
from rootstockd.systemd import Manager, describe
from rootstockd.words import so_many

log = logging.getLogger(__name__)

FEW_SESSIONS = 100
"""Where not even so many are possible at a time, whoever starts the daemon is told."""


class Daemon:
    """One daemon.

    Args:
        config: its settings.
        manager: the systemd that started it; without one it looks after itself.
        log_file: where what it prints goes, if that is a file of its own.

    Raises:
        CatalogueError: a catalogue file can't be used.
        UnknownModelError, ModelLoadError: a model to preload is not in the catalogue, or no weights of any are here.
    """

    def __init__(self, config: Config, manager: Manager | None = None, log_file: Path | None = None) -> None:
        self.config = config
        self._log_file = log_file
        self._manager = manager or Manager({})
        # atomic numbers take up to four bytes each; the rest of an INIT is short
        self.limits = ipi.Limits(atoms=config.max_atoms, init=64 * 1024 + 5 * config.max_atoms)
        self.fleet = Fleet(config)
        self.offer = Offer(Catalogue.load(config.catalogues, config.where("catalogues")), self.fleet)
        self.accounts = Accounts(config)
        self.errors: Counter[str] = Counter()
        self.notices = Notices()
        missing = not_to_preload(config.models, self.offer.catalogue)
        unknown = [error for error in missing if isinstance(error, UnknownModelError)]
        if unknown or (missing and len(missing) == len(config.models)):
            raise [*unknown, *missing][0]
        self._look_over(missing)
        self.sessions = SessionRegistry()
        self.state = "starting"
        self.since = time.time()
        self.metrics_url: str | None = None
        if any(device.kind == "cpu" for device in config.devices):
            self.notices.put("threads", one_thread())
        self._one_reload = asyncio.Lock()
        self._reloads: set[asyncio.Task[None]] = set()
        """Those that a signal has asked for."""
        self._replaced = False
        self._stop = asyncio.Event()
        self._force = asyncio.Event()

    async def run(self) -> None:
        """Live: start, serve, drain, stop.

        Raises:
            AddressError: the sockets can't be had.
        """
        self._watch_signals()  # first of all: what is taken below is given back
        self._share_descriptors()
        with contextlib.ExitStack() as ours:
            handed = self._manager.sockets
            if not handed:
                address.hold(self.config, ours)
            devices = found_devices(self.config.devices)
            for device in devices:
                if device.kind == "cuda":
                    ours.enter_context(claim_gpu(device.uuid))
            remove_left_behind()
            if handed:
                sessions, control = address.adopt_sockets(self.config, ours, handed)
            else:
                sessions, control = address.make_sockets(self.config, ours, lambda: self._replaced)
            if self._log_file is not None:
                outlive_it()
            servers = [control_server(self, control)]
            if self.config.metrics is not None:
                port = ours.enter_context(listen_tcp(self.config.metrics))
                self.metrics_url = url_of(port)
                log.info("metrics are at %s", self.metrics_url)
                servers.append(metrics_server(self, port))
            self.fleet.begin(devices)
            serving = [asyncio.create_task(server.run_until_stopped(), name="http") for server in servers]
            beside = [asyncio.create_task(self._manager.attend(self), name="systemd")]
            beside.append(asyncio.create_task(self._end_when_lost(), name="address"))
            try:
                acceptor = await self._start(sessions)
                if not self._stop.is_set():
                    log.info("ready on %s", self.config.socket)
                    self._manager.notify("READY=1", f"STATUS={describe(self)}")
                    await self._stop.wait()
                self._manager.notify("STOPPING=1")
                await self._drain(acceptor)
            finally:
                await self.fleet.stop(stopping_error())
                for task in beside:
                    task.cancel()
                for server in servers:
                    server.should_exit = True
                await asyncio.gather(*serving)
        log.info("stopped")

    def stop(self, *, force: bool = False, replaced: bool = False) -> None:
        """Begin to drain; with `force`, wait for nothing.

        When `replaced`, leave the address. Whoever stops a daemon that is being replaced calls that off: its successor
        finds the address gone.

        Raises:
            DrainingError: it was to be replaced, and is on its way down already.
        """
        stopping = self._stop.is_set()
        if stopping and replaced:
            what = "being restarted" if self._replaced else "stopping"
            raise DrainingError(f"the daemon is {what} already.", "See `rootstockd status` in a moment.")
        if force:
            self._force.set()
        self._replaced = replaced
        self._stop.set()

    async def reload(self) -> ReloadReport:
        """Read the configuration and the catalogues again; nothing is dropped that is there, and nobody waits for it.

        Returns:
            What has changed and is not taken over by all.

        Raises:
            ConfigError, CatalogueError: something in them is wrong, or can't be found out; all stays as it is.
            RootstockError: the new ones hold, but the daemon itself failed in what follows from them.
        """
        async with self._one_reload:
            try:
                return await self._reload()
            except (ConfigError, CatalogueError) as error:
                self.notices.put("reload", [f"not reloaded, all stays as it is: {error}"], logging.ERROR)
                raise
            except RootstockError as error:
                self.notices.put("reload", [str(error)], logging.ERROR)
                raise

    async def _reload(self) -> ReloadReport:
        ready = self.state == "ready"  # and not to be called so for this
        before = self.config
        try:
            with self._manager.reloading() if ready else contextlib.nullcontext():
                if self._log_file is not None:
                    self._reopen_log(self._log_file)
                return self._take_over(await read_files(self.config))
        except (ConfigError, CatalogueError):
            raise
        except Exception as error:
            log.exception("reloading failed")
            what = f"the daemon itself failed: {type(error).__name__}: {error}"
            if self.config is before:
                raise ConfigError(f"{what}; `rootstockd logs` has more.") from error
            raise RootstockError(
                f"the new configuration and catalogues hold, but not all was done that follows from them: {what}.",
                "`rootstockd restart` does all of it; `rootstockd logs` has more, for whoever maintains rootstockd.",
            ) from error

    def _take_over(self, files: Files) -> ReloadReport:
        fresh, catalogue, missing = files
        restart_needed = sorted(name for name in changes(self.config, fresh) if not reloadable(name))
        config = take_over(self.config, fresh)
        self.accounts.apply(config)  # the last that may fail; from here on the new settings hold
        self.config, self.offer.catalogue = config, catalogue
        self.fleet.apply(config)
        self.notices.put("reload", ())
        in_the_way = [] if self._manager.sockets else address.open_or_close(config)
        self.accounts.closed = bool(in_the_way) and not config.shared  # to all but administrators: no list says who
        self._look_over(missing, in_the_way)
        for name in restart_needed:
            log.warning("%s has changed and takes effect with the next restart", name)
        log.info("reloaded")
        shares = {account.uid: account.quota.share for account in self.accounts.active}
        for supervisor in self.fleet.supervisors():
            supervisor.scheduler.reshare(shares)
        self.accounts.let_in()
        models_kept = self.fleet.retire_changed(catalogue)
        self.offer.keep(self.config.models)
        for name, sessions in models_kept.items():
            log.info("model %s has changed; sessions that keep the old one: %d", name, sessions)
        warnings = self.notices.about("log", "settings")
        return ReloadReport(restart_needed=restart_needed, models_kept=models_kept, warnings=warnings)

    def _reopen_log(self, path: Path) -> None:
        """What the log itself can't tell, because the old file may be gone, `reload` and `status` do until it opens."""
        failed = []
        try:
            reopen_log(path)
        except OSError as error:
            where = "it goes on in the old file, which may be gone"
            failed = [f"can't open the log {path}: {error.strerror}; {where}; `rootstockd reload` tries again"]
        self.notices.put("log", failed)

    def _look_over(self, missing: Iterable[RootstockError], in_the_way: Iterable[str] = ()) -> None:
        """Warn of what can't be meant so, and of models that are to be loaded at a start and are not there."""
        absent = [f"to be loaded at the start, and can't be: {error}" for error in missing]
        others = self.config.shared and not self._manager.sockets  # those who find it by its folder
        closed = closed_folder(self.config.socket.parent) if others else []
        catalogue = self.offer.catalogue
        self.notices.put("settings", [*self.accounts.warnings, *catalogue.warnings(), *in_the_way, *closed, *absent])

    def _on_end(self, number: signal.Signals) -> None:
        log.info("%s: stopping", number.name)
        again = self._stop.is_set() and not self._replaced
        if again and number is signal.SIGTERM and job_runtime_dir() is not None:
            return  # Slurm sends it to all processes of a job, to some twice, and means no more by that
        self.stop(force=again)

    def _on_hangup(self) -> None:
        log.info("SIGHUP: reloading")
        reload = asyncio.create_task(self._reload_unasked())
        self._reloads.add(reload)
        reload.add_done_callback(self._reloads.discard)

    async def _reload_unasked(self) -> None:
        with contextlib.suppress(ConfigError, CatalogueError, RootstockError):  # status and the log say so
            await self.reload()

    async def _end_when_lost(self) -> None:
        """End where nobody can find it any more, as it would never be used again. Sessions that it has go on."""
        if self._manager.sockets:  # these are systemd's to keep
            return
        await address.until_lost(self.config)
        log.warning(
            "the sockets and the lock were removed, so nobody can find this daemon: it ends with the last of its "
            "sessions, of which there are %d",
            len(self.sessions),
        )
        await self.sessions.all_gone()
        self._stop.set()

    # --- the four parts of its life

    async def _start(self, sessions_socket: socket.socket) -> Acceptor:
        """Load what is to be preloaded, and take connections. Sessions that come early wait for their model."""
        acceptor = Acceptor(sessions_socket, lambda connection: Session(self, peer_of(connection)), self.look_up)
        self.offer.keep(self.config.models)
        loaded = asyncio.create_task(_settled(self.fleet))
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait([loaded, stopped], return_when=asyncio.FIRST_COMPLETED)
        loaded.cancel()
        stopped.cancel()
        errors = [model.error for model in self.fleet.kept if model.error is not None]
        if self._manager.watches and errors and len(errors) == len(self.fleet.kept):
            raise errors[0]  # systemd tries again
        if not self._stop.is_set():
            self.state = "ready"
        return acceptor

    async def _drain(self, acceptor: Acceptor) -> None:
        """Take no new evaluations; let those under way end, and their drivers fetch the results.

        Connections are taken meanwhile: whoever comes is told that the daemon is stopping, and may wait for the next.
        Where systemd keeps the socket, they wait in its queue, and the next daemon finds them there.
        """
        self.state = "draining"
        if self._manager.sockets:
            acceptor.close()
        log.info("draining%s: %d sessions", " for a restart" * self._replaced, len(self.sessions))
        fetched_by = time.monotonic() + LINGER
        deadline = time.monotonic() + self.config.drain_timeout
        while True:
            self.fleet.tell_verdicts()
            now = time.monotonic()
            if self._force.is_set() or now > deadline:
                break
            if any(session.under_way for session in self.sessions):
                fetched_by = now + LINGER
            elif now > fetched_by or not any(session.unfetched for session in self.sessions):
                break
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._force.wait(), 0.02)
        if not self._manager.sockets:
            acceptor.close()
        for session in self.sessions:
            session.end(stopping_error())
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.sessions.all_gone(), LINGER)

    def _share_descriptors(self) -> None:
        """So many sessions there may be, and so many more connections that are told why they can't be."""
        limit = raise_descriptor_limit()
        scrapers = 0 if self.config.metrics is None else MAX_SCRAPERS + 1
        allowed, self.sessions.max_turned_away = share_descriptors(limit - scrapers)
        why = f"all that its limit of {limit} open files (ulimit -n) allows"
        self.accounts.allow_sessions(allowed, why)
        if allowed < min(FEW_SESSIONS, self.config.max_sessions):
            self.notices.put("descriptors", [f"there is room for {so_many(allowed, 'session')} at a time, {why}"])

    def _watch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_end, number)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        for number in (signal.SIGUSR1, signal.SIGUSR2):  # Slurm's `--signal=USR1@60` goes to all processes of a job
            signal.signal(number, signal.SIG_IGN)

    def look_up(self, connection: socket.socket) -> asyncio.Future[None] | None:
        """What a new connection waits for until it is known whose it is, if anything."""
        return self.accounts.look_up(peer_of(connection).uid)

    # --- what sessions need

    def check_open(self) -> None:
        """Whether new work is taken.

        Raises:
            DrainingError: it is not.
        """
        if self.state == "draining":
            raise stopping_error()

    def open_model(self, request: InitRequest, account: Account, leaving: WorkerKey | None) -> Supervisor:
        """The model that a session asks for; see `Offer.open`, and `check_open`."""
        self.check_open()
        return self.offer.open(request, account, leaving)


async def _settled(fleet: Fleet) -> None:
    """Until all models that are to stay have settled, with those that a reload puts in their place meanwhile."""
    seen: set[Supervisor] = set()
    while waiting := set(fleet.kept) - seen:
        for model in waiting:
            await model.settled()
        seen |= waiting
