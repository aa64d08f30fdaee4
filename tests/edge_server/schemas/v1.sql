CREATE TABLE "devices" (
   "name" TEXT PRIMARY KEY,
   "group_name" TEXT NOT NULL,
   "registered" REAL NOT NULL,
   "credential" TEXT,
   "store_id" TEXT,
   "online" INTEGER DEFAULT 0,
   "reason" TEXT DEFAULT '',
   "boot" INTEGER DEFAULT 0,
   "digest" TEXT,
   "mode" TEXT DEFAULT '',
   "sdk" TEXT DEFAULT '',
   "state_release" INTEGER,
   "state_head" INTEGER,
   "row_release" INTEGER,
   "row_head" INTEGER,
   "row_time" REAL,
   "last_seen" REAL,
   "predictions" INTEGER DEFAULT 0,
   "errors" INTEGER DEFAULT 0,
   "labelled" INTEGER DEFAULT 0,
   "correct" INTEGER DEFAULT 0,
   "alarms" INTEGER DEFAULT 0,
   "warnings" INTEGER DEFAULT 0
);
CREATE INDEX "idx_devices_group_name_name"
    ON "devices" ("group_name", "name");
CREATE TABLE "positions" (
   "device" TEXT,
   "store_id" TEXT,
   "last_seq" INTEGER,
   PRIMARY KEY ("device", "store_id")
);
CREATE TABLE "reports" (
   "id" INTEGER PRIMARY KEY,
   "device" TEXT,
   "store_id" TEXT,
   "seq" INTEGER,
   "time" REAL,
   "received" REAL,
   "start" REAL,
   "release" INTEGER,
   "head" INTEGER,
   "predictions" INTEGER,
   "errors" INTEGER,
   "labelled" INTEGER,
   "correct" INTEGER,
   "body" BLOB
);
CREATE TABLE "events" (
   "id" INTEGER PRIMARY KEY,
   "device" TEXT,
   "store_id" TEXT,
   "seq" INTEGER,
   "time" REAL,
   "received" REAL,
   "name" TEXT,
   "release" INTEGER,
   "head" INTEGER,
   "subject" INTEGER,
   "detail" TEXT
);
CREATE TABLE "rejected" (
   "id" INTEGER PRIMARY KEY,
   "device" TEXT,
   "store_id" TEXT,
   "seq" INTEGER,
   "time" REAL,
   "received" REAL,
   "kind" TEXT,
   "reason" TEXT,
   "body" BLOB
);
CREATE UNIQUE INDEX "idx_reports_device_store_id_seq"
    ON "reports" ("device", "store_id", "seq");
CREATE UNIQUE INDEX "idx_events_device_store_id_seq"
    ON "events" ("device", "store_id", "seq");
CREATE UNIQUE INDEX "idx_rejected_device_store_id_seq"
    ON "rejected" ("device", "store_id", "seq");
CREATE INDEX "idx_reports_device_id"
    ON "reports" ("device", "id");
CREATE INDEX "idx_reports_release_device"
    ON "reports" ("release", "device");
CREATE INDEX "idx_reports_start"
    ON "reports" ("start");
CREATE INDEX "idx_events_device_id"
    ON "events" ("device", "id");
CREATE INDEX "idx_events_subject_name"
    ON "events" ("subject", "name");
CREATE TABLE "gaps" (
   "id" INTEGER PRIMARY KEY,
   "device" TEXT,
   "store_id" TEXT,
   "first" INTEGER,
   "last" INTEGER,
   "source" TEXT,
   "received" REAL
);
CREATE UNIQUE INDEX "idx_gaps_device_store_id_first"
    ON "gaps" ("device", "store_id", "first");
CREATE TABLE "releases" (
   "release" INTEGER PRIMARY KEY,
   "name" TEXT,
   "digest" TEXT,
   "size" INTEGER,
   "parent" TEXT,
   "labels" TEXT,
   "metrics" TEXT,
   "pushed" REAL
);
CREATE TABLE "groups" (
   "name" TEXT PRIMARY KEY,
   "revision" INTEGER,
   "base" INTEGER,
   "revoked" TEXT,
   "desired" BLOB
);
CREATE TABLE "rollouts" (
   "id" INTEGER PRIMARY KEY,
   "group_name" TEXT,
   "release" INTEGER,
   "active" INTEGER,
   "started" REAL,
   "plan" TEXT,
   "state" TEXT
);
CREATE INDEX "idx_rollouts_active"
    ON "rollouts" ("active");
CREATE TABLE "counters" (
   "name" TEXT PRIMARY KEY,
   "value" INTEGER
);
CREATE TABLE "unknown" (
   "device" TEXT PRIMARY KEY,
   "messages" INTEGER,
   "last_seen" REAL
);
CREATE TABLE "audit" (
   "id" INTEGER PRIMARY KEY,
   "time" REAL,
   "actor" TEXT,
   "action" TEXT,
   "detail" TEXT
);
PRAGMA user_version = 1;
