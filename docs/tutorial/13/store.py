import contextlib
import sqlite3
import time

def turn(call_sid, words):
    insert = "INSERT INTO turns (call_sid, words) VALUES (?, ?) RETURNING turn"
    return sql(insert, call_sid, words)[0][0]

def turns(call_sid):
    return sql("SELECT words, reply FROM turns WHERE call_sid = ? ORDER BY turn", call_sid)

def grow(turn, text, stop=None):
    sql("UPDATE turns SET reply = reply || ?, stop = ? WHERE turn = ?", text, stop, turn)

def wait(turn, heard):  # new
    for _ in range(60):  # 6 seconds, since Twilio waits only 15
        ((reply, stop),) = sql("SELECT reply, stop FROM turns WHERE turn = ?", turn)
        if stop or len(reply) > heard:  # new
            break
        time.sleep(0.1)
    return reply, stop

def end(call_sid):
    sql("DELETE FROM turns WHERE call_sid = ?", call_sid)

def sql(statement, *values):
    with contextlib.closing(sqlite3.connect("calls.db", isolation_level=None)) as database:
        database.execute("CREATE TABLE IF NOT EXISTS turns (turn INTEGER PRIMARY KEY,"
                         " call_sid, words, stop, reply DEFAULT '')")
        return database.execute(statement, values).fetchall()
