# SQLite with the journal $JOURNAL. What it prints stays in its buffer; a file of one row does not.
make() { sqlite3 db "pragma journal_mode=$JOURNAL; create table t(id integer primary key, content text);" >&2; }

commit() {
  row=$(head -c 400 /dev/zero | tr '\0' x); id=0
  while [ ! -e $OVER ]; do id=$((id + 1)); printf '%s\n' "insert into t values($id, '$row');" ".once $LAST" "select $id;"; done |
    (echo 'pragma synchronous=full;'; cat) | sqlite3 -batch -bail db
}

look() { sqlite3 db "pragma integrity_check; select count(*) from t where id <= $ROWS;"; }
