#!/bin/bash
# Tests the reload under a real systemd. Run it as root on a disposable machine (a container or VM), with the program in
# $VENV and the unit installed as $UNIT: it overwrites $CONFIG and the key, adds a sink to $VENV, and starts and stops
# the service. It prints its results, and exits with 0 if all checks pass.
set -euo pipefail

UNIT=${UNIT:-vodpoller.service}
VENV=${VENV:-/opt/vodpoller/venv}
CONFIG=${CONFIG:-/etc/vodpoller/config.toml}
STATE=/var/lib/vodpoller
PORT=18080
VODPOLLER=$VENV/bin/vodpoller
PYTHON=$VENV/bin/python
SHUTDOWN_SECS=8

fail() {
    echo "FAILED: $*" >&2
    systemctl status --no-pager "$UNIT" >&2 || true
    journalctl --no-pager -u "$UNIT" -n 30 >&2 || true
    exit 1
}
good() { echo "good: $*"; }
until_true() { # SECS COMMAND...
    local secs=$1
    shift
    for _ in $(seq $((secs * 10))); do
        if "$@" >/dev/null 2>&1; then return 0; fi
        sleep 0.1
    done
    fail "not within $secs s: $*"
}
now_ms() { date +%s%3N; }
main_pid() { systemctl show -p MainPID --value "$UNIT"; }
lines_in() { cat "$@" 2>/dev/null | wc -l; }
has_lines() { [ "$(lines_in "$2")" -ge "$1" ]; }
stats() { curl -s "http://127.0.0.1:$PORT/_stats" | "$PYTHON" -c "import json, sys; print(json.load(sys.stdin)['$1'])"; }
all_confirmed() { [ "$(stats confirmed)" -eq "$(stats fed)" ]; }

configure() { # JOURNAL SINK-TABLES...: all events go to all of the sinks
    local journal=$1 names
    shift
    names=$(printf '%s\n' "$@" | sed -nE 's/^\[sinks\.(.*)\]$/"\1"/p' | paste -sd,)
    {
        printf '[api]\nendpoint = "http://127.0.0.1:%s"\n' "$PORT"
        printf '[[sources]]\nname = "main"\n'
        printf '[[routes]]\nname = "all"\nsinks = [%s]\n' "$names"
        printf '%s\n' "$@"
        printf '[journal]\npath = "%s"\n[daemon]\nshutdown_secs = %s\n' "$journal" "$SHUTDOWN_SECS"
    } >"$CONFIG"
    chmod 644 "$CONFIG"
}
file_sink() { printf '[sinks.%s]\ntype = "file"\npath = "%s/%s.jsonl"\n' "$1" "$STATE" "$1"; }

install -d -m 755 "$(dirname "$CONFIG")"
for name in secret_id secret_key; do
    (umask 077 && printf %s "the-$name-of-the-test" >"$(dirname "$CONFIG")/$name")
done
site=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$site/vodpoller_hang-1.dist-info"
cat >"$site/vodpoller_hang.py" <<'PLUGIN'
import threading
from vodpoller.sinks import Sink, SinkConfig

class NeverSink(Sink):
    Config = SinkConfig
    timeout_secs = 1.0

    def deliver(self, events, timeout_secs):
        threading.Event().wait()
PLUGIN
printf 'Metadata-Version: 2.1\nName: vodpoller-hang\nVersion: 1\n' >"$site/vodpoller_hang-1.dist-info/METADATA"
printf '[vodpoller.sinks]\nnever = vodpoller_hang:NeverSink\n' >"$site/vodpoller_hang-1.dist-info/entry_points.txt"

"$VODPOLLER" simulate --port "$PORT" --poll-secs 1 --visibility-secs 30 --rate 200 --feed 4000 >/dev/null &
simulator=$!
trap 'kill $simulator' EXIT
until_true 30 stats fed

# --- a changed route under 200 events per second ---
configure "$STATE/journal.db" "$(file_sink before)"
systemctl daemon-reload
began=$(now_ms)
systemctl start "$UNIT"
start_ms=$(($(now_ms) - began))
pid=$(main_pid)
until_true 30 has_lines 200 "$STATE/before.jsonl"
configure "$STATE/journal.db" "$(file_sink after)"
systemctl reload "$UNIT" || fail "a changed route was refused"
before=$(lines_in "$STATE/before.jsonl")
until_true 30 has_lines 200 "$STATE/after.jsonl"
until_true 120 all_confirmed
[ "$(lines_in "$STATE/before.jsonl")" -eq "$before" ] || fail "the former route got events after the reload"
[ "$(main_pid)" = "$pid" ] || fail "another process runs"
all=$(lines_in "$STATE/before.jsonl" "$STATE/after.jsonl")
different=$(sort -u "$STATE/before.jsonl" "$STATE/after.jsonl" | wc -l)
fed=$(stats fed)
[ "$all" -eq "$fed" ] && [ "$different" -eq "$fed" ] || fail "$fed events, $all lines, $different of them different"
[ "$(stats redeliveries)" -eq 0 ] || fail "$(stats redeliveries) events were redelivered"
good "a changed route: $fed events, $before lines before and $((all - before)) after, none lost, none doubled"

# --- a broken file ---
cp "$CONFIG" "$CONFIG.good"
printf '[api\n' >>"$CONFIG"
mv "$STATE/after.jsonl" "$STATE/after.jsonl.1"
output=$(systemctl reload "$UNIT" 2>&1) && fail "a broken file was not refused"
good "a broken file is refused: $output"
[ "$(systemctl is-active "$UNIT")" = active ] && [ "$(main_pid)" = "$pid" ] || fail "the service has stopped or restarted"
until_true 10 test -e "$STATE/after.jsonl"
good "the files were reopened anyway"
journalctl --no-pager -o cat -u "$UNIT" | grep -q "$CONFIG: line " || fail "the log does not show the mistake"
systemctl status --no-pager "$UNIT" | grep "the last reload was refused" || fail "systemctl status does not show it"
output=$("$VODPOLLER" status -c "$CONFIG" 2>&1) && fail "vodpoller status ends with 0"
grep "PROBLEM configuration" <<<"$output" || fail "vodpoller status does not show it"
cp "$CONFIG.good" "$CONFIG"
systemctl reload "$UNIT" || fail "the corrected file was refused"
"$VODPOLLER" status -c "$CONFIG" || fail "vodpoller status still has a problem"
good "the corrected file is accepted"

# --- another journal: the configuration no longer has the path of the daemon's socket ---
configure "$STATE/other.db" "$(file_sink after)"
systemctl reload "$UNIT" || fail "another journal was refused, or the daemon was not found"
[ -S "$STATE/other.db.sock" ] && [ ! -e "$STATE/journal.db.sock" ] || fail "the status socket has not moved"
good "another journal is accepted"

# --- a sink that hangs ---
never='[sinks.never]
type = "never"'
configure "$STATE/other.db" "$(file_sink after)" "$never"
systemctl reload "$UNIT" || fail "the sink that hangs was refused"
printf '{"EventType":"NewFileUpload","FileUploadEvent":{"FileId":"last"}}\n' |
    curl -s --data-binary @- "http://127.0.0.1:$PORT/_feed" >/dev/null
until_true 60 all_confirmed
configure "$STATE/other.db" "$(file_sink last)" "$never"
began=$(now_ms)
systemctl reload "$UNIT" || fail "the reload with a sink that hangs was refused"
took_ms=$(($(now_ms) - began))
# Besides the stop: the start of the command, and of the program again. A busy machine is slower at both, as at the start.
beyond_ms=$((start_ms > 1700 ? 3 * start_ms : 5000))
[ "$(main_pid)" = "$pid" ] || fail "another process runs"
[ "$took_ms" -le $((SHUTDOWN_SECS * 1000 + beyond_ms)) ] || fail "it took $took_ms ms, and a start $start_ms ms"
[ "$(systemctl show -p NRestarts --value "$UNIT")" = 0 ] || fail "systemd has restarted it"
[ "$(systemctl is-active "$UNIT")" = active ] || fail "it is $(systemctl is-active "$UNIT")"
good "with a sink that hangs it took $took_ms ms (shutdown_secs = $SHUTDOWN_SECS, a start $start_ms ms), and the process is the same"

systemctl stop "$UNIT"
good "all checks"
