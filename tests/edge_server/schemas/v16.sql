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
, "enrolment" INTEGER NOT NULL DEFAULT 1, "revoked" REAL, "hardware" TEXT NOT NULL DEFAULT '', "disk_free_mb" INTEGER, "memory_free_mb" INTEGER, "memory_total_mb" INTEGER);
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
, "mode" TEXT NOT NULL DEFAULT '', "alarms" INTEGER NOT NULL DEFAULT 0, "warnings" INTEGER NOT NULL DEFAULT 0, "p50_ms" REAL NOT NULL DEFAULT 0.0, "p99_ms" REAL NOT NULL DEFAULT 0.0);
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
, "mode" TEXT NOT NULL DEFAULT '');
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
CREATE TABLE "certificates" (
   "serial" TEXT PRIMARY KEY,
   "device" TEXT NOT NULL,
   "pem" TEXT NOT NULL,
   "issued" REAL NOT NULL,
   "expires" REAL NOT NULL,
   "command" TEXT,
   "in_use" INTEGER DEFAULT 0,
   "revoked" REAL
);
CREATE INDEX "idx_certificates_device"
    ON "certificates" ("device");
CREATE TABLE "commands" (
   "id" TEXT PRIMARY KEY,
   "device" TEXT,
   "name" TEXT,
   "args" TEXT,
   "issued" REAL,
   "expires" REAL,
   "actor" TEXT,
   "outcome" TEXT DEFAULT 'waiting',
   "answered" REAL,
   "reason" TEXT DEFAULT '',
   "result" TEXT DEFAULT ''
);
CREATE INDEX "idx_commands_outcome_device"
    ON "commands" ("outcome", "device");
CREATE TABLE "summaries" (
   "device" TEXT,
   "hour" INTEGER,
   "time" REAL,
   "received" REAL,
   "release" INTEGER,
   "head" INTEGER,
   "reference" TEXT,
   "rows" INTEGER,
   "body" BLOB,
   "start" REAL NOT NULL DEFAULT '0.0', "span" INTEGER NOT NULL DEFAULT 3600,
   PRIMARY KEY ("device", "hour", "start")
);
CREATE TABLE "fleet_state" (
   "name" TEXT PRIMARY KEY,
   "body" BLOB NOT NULL
);
CREATE INDEX "idx_events_name_received"
    ON "events" ("name", "received");
CREATE TABLE "alerts" (
   "id" INTEGER PRIMARY KEY,
   "kind" TEXT,
   "cause" TEXT,
   "severity" TEXT,
   "status" TEXT,
   "since" REAL,
   "raised" REAL,
   "resolved" REAL,
   "body" TEXT
);
CREATE INDEX "idx_alerts_status_resolved"
    ON "alerts" ("status", "resolved");
CREATE TABLE "silences" (
   "id" INTEGER PRIMARY KEY,
   "kind" TEXT,
   "cause" TEXT,
   "device" TEXT,
   "until" REAL,
   "actor" TEXT,
   "reason" TEXT,
   "created" REAL
);
CREATE TABLE "deliveries" (
   "id" INTEGER PRIMARY KEY,
   "alert" INTEGER,
   "sink" TEXT,
   "body" TEXT,
   "created" REAL,
   "attempts" INTEGER DEFAULT 0,
   "next_at" REAL,
   "done" REAL,
   "error" TEXT DEFAULT ''
);
CREATE INDEX "idx_deliveries_done_sink_id"
    ON "deliveries" ("done", "sink", "id");
CREATE TABLE "candidates" (
   "digest" TEXT PRIMARY KEY,
   "name" TEXT,
   "release" INTEGER,
   "champion" INTEGER,
   "verdict" TEXT,
   "reason" TEXT,
   "built" REAL,
   "report" TEXT
, "card" TEXT NOT NULL DEFAULT '');
CREATE INDEX "idx_summaries_received"
    ON "summaries" ("received");
CREATE INDEX "idx_commands_device_issued"
    ON "commands" ("device", "issued");
CREATE TABLE "rollups" (
   "id" INTEGER PRIMARY KEY,
   "device" TEXT NOT NULL,
   "span" INTEGER NOT NULL,
   "start" INTEGER NOT NULL,
   "release" INTEGER NOT NULL,
   "reports" INTEGER DEFAULT 0,
   "predictions" INTEGER DEFAULT 0,
   "errors" INTEGER DEFAULT 0,
   "labelled" INTEGER DEFAULT 0,
   "correct" INTEGER DEFAULT 0,
   "alarmed" INTEGER DEFAULT 0,
   "warned" INTEGER DEFAULT 0,
   "received_bytes" INTEGER DEFAULT 0,
   "latency" BLOB NOT NULL
);
CREATE UNIQUE INDEX "idx_rollups_device_span_start_release"
    ON "rollups" ("device", "span", "start", "release");
CREATE INDEX "idx_rollups_span_start"
    ON "rollups" ("span", "start");
CREATE TABLE "rolled_up" (
   "name" TEXT PRIMARY KEY,
   "last" INTEGER
);
CREATE INDEX idx_devices_revoked ON devices (revoked) WHERE revoked IS NOT NULL;
CREATE TABLE "labels" (
   "device" TEXT,
   "key" TEXT,
   "value" TEXT NOT NULL,
   PRIMARY KEY ("device", "key")
);
CREATE INDEX "idx_labels_key_value"
    ON "labels" ("key", "value");
CREATE INDEX "idx_audit_time"
    ON "audit" ("time");
CREATE TABLE "version_days" (
   "device" TEXT,
   "release" INTEGER,
   "head" INTEGER,
   "day" INTEGER,
   "start" REAL,
   "predictions" INTEGER,
   "labelled" INTEGER,
   "correct" INTEGER,
   PRIMARY KEY ("device", "release", "head", "day")
);
CREATE TABLE "users" (
   "id" INTEGER PRIMARY KEY,
   "name" TEXT NOT NULL,
   "role" TEXT NOT NULL,
   "digest" TEXT NOT NULL,
   "created" REAL NOT NULL,
   "revoked" REAL
);
CREATE UNIQUE INDEX "idx_users_digest"
    ON "users" ("digest");
CREATE TABLE "sessions" (
   "digest" TEXT PRIMARY KEY,
   "user" INTEGER NOT NULL,
   "created" REAL,
   "expires" REAL NOT NULL
);
CREATE INDEX "idx_audit_actor_id"
    ON "audit" ("actor", "id");
CREATE INDEX "idx_summaries_span_hour"
    ON "summaries" ("span", "hour");
CREATE TABLE "segments" (
   "name" TEXT PRIMARY KEY,
   "query" TEXT NOT NULL,
   "created" REAL NOT NULL,
   "actor" TEXT NOT NULL
);
PRAGMA user_version = 16;
