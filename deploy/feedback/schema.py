"""The tables of a round's file, which `Store` fills and `Asking` chooses from."""

from __future__ import annotations

from typing import Final

VERSION: Final = 2
SCHEMA: Final = """
CREATE TABLE pairs (
    uid TEXT PRIMARY KEY,
    place INTEGER NOT NULL UNIQUE,
    wanted INTEGER NOT NULL,
    missing INTEGER NOT NULL,
    again INTEGER NOT NULL
) STRICT;
CREATE INDEX open_pairs ON pairs (place) WHERE missing > 0;
CREATE INDEX known_pairs ON pairs (place) WHERE wanted = 0;
CREATE TABLE labelers (
    name TEXT PRIMARY KEY,
    since REAL NOT NULL,
    read_guidelines REAL,
    practised INTEGER NOT NULL DEFAULT 0,
    cursor INTEGER NOT NULL DEFAULT 0,
    standing INTEGER NOT NULL DEFAULT 0,
    ever INTEGER NOT NULL DEFAULT 0,
    known_at INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE due (
    labeler TEXT NOT NULL,
    pair TEXT NOT NULL,
    after INTEGER NOT NULL,
    PRIMARY KEY (labeler, pair)
) STRICT;
CREATE TABLE answers (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL UNIQUE,
    labeler TEXT NOT NULL,
    pair TEXT NOT NULL,
    occasion INTEGER NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('answer', 'skip', 'undo')),
    step INTEGER,
    first_is_left INTEGER NOT NULL,
    why TEXT NOT NULL,
    flagged INTEGER NOT NULL,
    seconds REAL NOT NULL,
    at REAL NOT NULL,
    undoes INTEGER REFERENCES answers (id)
) STRICT;
CREATE INDEX answers_of ON answers (labeler, pair);
CREATE INDEX last_answers ON answers (labeler);
CREATE UNIQUE INDEX undone_once ON answers (undoes) WHERE undoes IS NOT NULL;
CREATE VIEW standing AS
    SELECT * FROM answers a WHERE a.kind != 'undo'
    AND NOT EXISTS (SELECT 1 FROM answers u WHERE u.undoes = a.id);
CREATE TABLE leases (
    labeler TEXT PRIMARY KEY,
    pair TEXT NOT NULL,
    occasion INTEGER NOT NULL,
    key TEXT NOT NULL UNIQUE,
    first_is_left INTEGER NOT NULL,
    given REAL NOT NULL,
    until REAL NOT NULL
) STRICT;
CREATE TABLE closed (at REAL NOT NULL) STRICT;
CREATE TABLE expired (
    key TEXT PRIMARY KEY,
    labeler TEXT NOT NULL,
    pair TEXT NOT NULL,
    occasion INTEGER NOT NULL,
    first_is_left INTEGER NOT NULL,
    given REAL NOT NULL
) STRICT;
"""
