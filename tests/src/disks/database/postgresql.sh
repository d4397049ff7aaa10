# PostgreSQL as a user of its own, as its package has it. Pages have checksums; files of the log are small, so that they are used again
# and again, and checkpoints are frequent. The second index has each row at another place.
export PATH="$(echo /usr/lib/postgresql/*/bin):$PATH" PGDATA=/mnt/data PGHOST=/tmp PGUSER=postgres PGDATABASE=postgres TZ=GMT
SERVER=/tmp/server.log

as_user() { (cd / && su postgres -c "$*"); }
# However slow the machine is, it is the caller who gives up.
start() { as_user "pg_ctl start -s -w -t 86400 -l $SERVER" || { cat $SERVER >&2; return 1; }; }
# pg_ctl waits for the server's file with its number alone: the process, whose working directory is on the disk, ends a moment later.
stop() {
  server=$(head -n 1 $PGDATA/postmaster.pid)
  as_user "pg_ctl stop -s -w -t 86400 -m fast" || { cat $SERVER >&2; return 1; }
  while kill -0 $server 2>/dev/null; do sleep 0.1; done
}
ask() { psql -qAtX -v ON_ERROR_STOP=1 "$@" || { cat $SERVER >&2; return 1; }; }
has_shared_memory() { [ -d /dev/shm ] || { mkdir /dev/shm && mount -t tmpfs shm /dev/shm; }; }

make() {
  has_shared_memory && mkdir data && chown postgres data && chmod 700 data &&
    as_user "initdb --data-checksums --no-locale -E UTF8 -A trust --wal-segsize=1" >&2 || return 1
  printf '%s\n' "listen_addresses = ''" "unix_socket_directories = '/tmp'" 'shared_buffers = 8MB' 'min_wal_size = 2MB' \
    'max_wal_size = 8MB' 'checkpoint_timeout = 30s' 'max_connections = 10' 'restart_after_crash = off' >>data/postgresql.conf
  start && ask -c 'create table t(id integer primary key, content text); create index on t(content);'
}

commit() {
  id=0
  while [ ! -e $OVER ]; do
    id=$((id + 1))
    # Long lines, for the same reason as long rows.
    printf '%400s\n' "insert into t values ($id, repeat(md5('$id'), 12)) returning id \\g $LAST"
  done | ask >&2 && stop
}

look() {
  has_shared_memory && start || return 1
  what=$(pg_amcheck --install-missing --heapallindexed --parent-check 2>&1) || what="pg_amcheck failed: $what"
  rows=$(ask -c "select count(*) from t where id <= $ROWS") && stop || return 1
  sums=$(as_user pg_checksums --check 2>&1) && sums= || sums="pg_checksums failed: $sums"
  if [ -z "$what$sums" ]; then echo ok; else printf '%s\n' "$what$sums"; fi
  echo $rows
}
