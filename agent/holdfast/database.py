"""Opens the SQLite file that `store` keeps its tables in, makes the tables, and brings older ones up to date."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from pathlib import Path

from holdfast.errors import NotPermitted, UnfitHost

VERSION = 3
CONTAINERS = """
CREATE TABLE containers  (app TEXT, digest TEXT, value BLOB NOT NULL, PRIMARY KEY (app, digest)) WITHOUT ROWID"""
#: Older version → what brings a database of it to the next one.
MIGRATIONS = {
    1: "ALTER TABLE generations ADD COLUMN state TEXT",
    2: CONTAINERS,
}
#: What passes when there is room again, or the disk works again; anything else is a bug or damage.
PASSING = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_BUSY,
)
SCHEMA = f"""
CREATE TABLE instances   (id TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE receipts    (kind TEXT, id TEXT, at INTEGER, value BLOB NOT NULL, PRIMARY KEY (kind, id)) WITHOUT ROWID;
CREATE TABLE generations (app TEXT, number INTEGER, value BLOB NOT NULL, state TEXT,
                          PRIMARY KEY (app, number)) WITHOUT ROWID;
{CONTAINERS};
CREATE TABLE holds       (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE failures    (subject TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE intents     (subject TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE facts       (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE events      (seq INTEGER PRIMARY KEY AUTOINCREMENT, value BLOB NOT NULL);
"""


def open_database(path: Path) -> sqlite3.Connection:
    """Open the database of a store. Raises UnfitHost, or NotPermitted."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        turn = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _unopened(path, error) from error
    try:
        fcntl.flock(turn, fcntl.LOCK_EX)  # two that turn on write-ahead mode at once do not wait for each other
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # its siblings get the same mode
        db = _connect(path)
        if _version(db) == 0:
            _make_tables(db)
        while _version(db) in MIGRATIONS:
            _migrate(db)
        if (version := _version(db)) != VERSION:
            raise UnfitHost(f"open store '{path}': it is of version {version} (this holdfast writes {VERSION})")
    except (sqlite3.Error, OSError) as error:
        raise _unopened(path, error) from error
    finally:
        os.close(turn)
    return db


def _unopened(path: Path, error: sqlite3.Error | OSError) -> UnfitHost:
    """Why the database can't be opened."""
    if isinstance(error, PermissionError):
        return NotPermitted(f"open store '{path}': {(error.strerror or '').lower()} (become root)")
    return UnfitHost(f"open store '{path}': {error}")


def _connect(path: Path) -> sqlite3.Connection:
    """Open the database; alone where the disk has no room for the index that it shares with other processes."""
    for mode in ("NORMAL", "EXCLUSIVE"):
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5)
        try:
            db.execute(f"PRAGMA locking_mode = {mode}")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            _version(db)
        except sqlite3.Error as error:
            db.close()
            if mode == "EXCLUSIVE" or (error.sqlite_errorcode & 0xFF) not in PASSING:
                raise
        else:
            return db
    raise AssertionError("the last mode either opens or raises")


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _migrate(db: sqlite3.Connection) -> None:
    """Bring an older database to the next version, unless another process has just done so."""
    db.execute("BEGIN IMMEDIATE")
    if (version := _version(db)) in MIGRATIONS:
        db.execute(MIGRATIONS[version])
        db.execute(f"PRAGMA user_version = {version + 1}")
    db.execute("COMMIT")


def _make_tables(db: sqlite3.Connection) -> None:
    """Make the tables, unless another process (a command beside the first agent) has just done so."""
    db.execute("BEGIN IMMEDIATE")
    if _version(db) == 0:
        for statement in SCHEMA.strip().split(";"):
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {VERSION}")
    db.execute("COMMIT")
