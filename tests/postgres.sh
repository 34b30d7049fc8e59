#!/bin/sh
# PostgreSQL for the slow tests: where there is none and root runs this on Debian, install it; else say what is missing.
set -eu
if ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null; then
    exit 0
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    # Without the cluster that the package would start; the tests make one of their own.
    mkdir -p /etc/postgresql-common
    echo "create_main_cluster = false" > /etc/postgresql-common/createcluster.conf
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq postgresql >/dev/null && exit 0
fi
echo "PostgreSQL is not installed (Debian: apt-get install postgresql): its tests will be skipped" >&2
