# SPDX-License-Identifier: Apache-2.0
"""What Redis does by itself for the store of notifications, in Lua: each script at once, seen by others whole or not at all."""

from __future__ import annotations

from typing import Final

# KEYS: stream, again. ARGV: group.
# The first command does nothing, unless it fails because the key is no stream: then nothing else is done. When memory is short,
# scripts may do what needs some only after they have written.
_MOVE: Final = """
local stream, again, group = KEYS[1], KEYS[2], ARGV[1]
redis.call('XACK', again, group, '0-0')
local function move(from, id, consumer, to, tried, ...)
    if #redis.call('XPENDING', from, group, id, id, 1, consumer) == 0 then return end
    local entry = redis.call('XRANGE', from, id, id)[1]
    redis.call('XACK', from, group, id)
    if entry then
        redis.call('XADD', to, '*', 'tries', entry[2][2] + tried, 'body', entry[2][4], ...)
        if from == again then redis.call('XDEL', from, id) end
    end
end
local function release(consumer, tried, known)
    for mark, from in pairs({[''] = stream, ['+'] = again}) do
        local after, found = '-'
        repeat
            found = redis.call('XPENDING', from, group, after, '+', 100, consumer)
            for _, entry in ipairs(found) do
                after = '(' .. entry[1]
                if not known[mark .. entry[1]] then move(from, entry[1], consumer, again, tried) end
            end
        until #found == 0
    end
end
local function leave(consumer, tried)
    release(consumer, tried, {})
    redis.call('XGROUP', 'DELCONSUMER', stream, group, consumer)
    redis.call('XGROUP', 'DELCONSUMER', again, group, consumer)
end
"""

# KEYS: stream, again, where to. ARGV: group, consumer, 1 if this time counts, number of fields to add, them, names.
GIVE: Final = f"""{_MOVE}
redis.call('XLEN', KEYS[3])
local n = tonumber(ARGV[4])
for i = 5 + n, #ARGV do
    local mark, id = string.match(ARGV[i], '(%+?)(.+)')
    move(mark == '+' and again or stream, id, ARGV[2], KEYS[3], ARGV[3], unpack(ARGV, 5, 4 + n))
end
"""

# KEYS: stream, again. ARGV: group, consumer.
LEAVE: Final = f"""{_MOVE}
leave(ARGV[2], 0)
"""

# That it reads what it has after a message that cannot be there is all that Redis notes. The very last id would mean '>'.
# KEYS: stream, again, looked. ARGV: group, consumer, ms for which others must have been silent or '' to not look for them, how
# long nobody else need look (ms), names that the consumer knows.
LIVE: Final = f"""{_MOVE}
local last = '18446744073709551615-0'
redis.call('XREADGROUP', 'GROUP', group, ARGV[2], 'COUNT', 1, 'STREAMS', stream, again, last, last)
local known = {{}}
for i = 5, #ARGV do known[ARGV[i]] = true end
release(ARGV[2], 0, known)
if ARGV[3] == '' or not redis.call('SET', KEYS[3], '', 'NX', 'PX', ARGV[4]) then return end
for _, flat in ipairs(redis.call('XINFO', 'CONSUMERS', stream, group)) do
    local about = {{}}
    for i = 1, #flat, 2 do about[flat[i]] = flat[i + 1] end
    if about.idle >= tonumber(ARGV[3]) then leave(about.name, 1) end
end
"""

# First goes what all pools have processed; then what is beyond the bounds, one by one as long as all pools have taken it, to
# count what they have not processed; and all at once where some pool has not taken it.
# KEYS: stream, dropped, dead. ARGV: most messages, most ms, topic, what the names of its streams for one pool begin with.
TRIM: Final = """
local stream, most = KEYS[1], tonumber(ARGV[1])
local function parts(id)
    local ms, number = string.match(id, '(%d+)-(%d+)')
    return tonumber(ms), tonumber(number)
end
local function less(a, b)
    local ams, an = parts(a)
    local bms, bn = parts(b)
    return ams < bms or ams == bms and an < bn
end
local function following(id)
    local ms, number = parts(id)
    return string.format('%.0f-%.0f', ms, number + 1)
end
local now = redis.call('TIME')
local young = string.format('%.0f-0', math.max(0, now[1] * 1000 + math.floor(now[2] / 1000) - ARGV[2]))
local function bound(key)
    return redis.call('XTRIM', key, 'MAXLEN', most) + redis.call('XTRIM', key, 'MINID', young)
end
bound(KEYS[3])
if redis.call('EXISTS', stream) == 0 then return 0 end
local pools, default, consumers, unprocessed, taken = {}, false, 0
for _, flat in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local about = {}
    for i = 1, #flat, 2 do about[flat[i]] = flat[i + 1] end
    local last = about['last-delivered-id']
    local first = redis.call('XPENDING', stream, about.name)[2] or following(last)
    pools[#pools + 1], consumers = about.name, consumers + about.consumers
    default = default or about.name == 'pool:'
    if not taken or less(last, taken) then taken = last end
    if not unprocessed or less(first, unprocessed) then unprocessed = first end
end
if not default then taken, unprocessed = '0-0', '0-0' end
redis.call('XTRIM', stream, 'MINID', unprocessed)
local dropped, over, gone, page = 0, redis.call('XLEN', stream) - most
repeat
    page = redis.call('XRANGE', stream, gone and '(' .. gone or '-', taken, 'COUNT', 100)
    for _, entry in ipairs(page) do
        if over <= 0 and not less(entry[1], young) then page = {} break end
        over, gone = over - 1, entry[1]
        for _, pool in ipairs(pools) do
            if #redis.call('XPENDING', stream, pool, gone, gone, 1) > 0 then dropped = dropped + 1 break end
        end
    end
until #page == 0
if gone then redis.call('XTRIM', stream, 'MINID', following(gone)) end
dropped = dropped + bound(stream)
for _, pool in ipairs(pools) do dropped = dropped + bound(ARGV[4] .. string.sub(pool, 6)) end
if dropped > 0 then redis.call('HINCRBY', KEYS[2], ARGV[3], dropped) end
-- Nobody can tell whether it is there: other pools than the default one would have to be remembered.
if redis.call('XLEN', stream) + redis.call('XLEN', ARGV[4]) + consumers + redis.call('HEXISTS', KEYS[2], ARGV[3]) == 0
    and #pools == (default and 1 or 0) then redis.call('DEL', stream, ARGV[4]) end
return dropped
"""

# KEYS: stream, dropped. ARGV: topic, what the names of its streams for one pool begin with, ms after which a silent consumer is
# dead. Returns the time in ms, number of messages, id of the oldest, number of those dropped, and for each group its name, the
# last id it was given, number of messages taken, of those waiting in its own stream, of consumers, and the first ids.
STATE: Final = """
local function first(key, from)
    local entry = redis.call('XRANGE', key, from, '+', 'COUNT', 1)[1]
    return entry and entry[1] or ''
end
if redis.call('EXISTS', KEYS[1]) == 0 then return {} end
local now = redis.call('TIME')
local state = {
    string.format('%.0f', now[1] * 1000 + math.floor(now[2] / 1000)), redis.call('XLEN', KEYS[1]), first(KEYS[1], '-'),
    tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or 0), {},
}
for _, flat in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    local about = {}
    for i = 1, #flat, 2 do about[flat[i]] = flat[i + 1] end
    local again = ARGV[2] .. string.sub(about.name, 6)
    local alive = 0
    for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], about.name)) do
        for i = 1, #consumer, 2 do
            if consumer[i] == 'idle' and consumer[i + 1] < tonumber(ARGV[3]) then alive = alive + 1 end
        end
    end
    local last = about['last-delivered-id']
    local taken = redis.pcall('XPENDING', again, about.name)[1] or 0
    table.insert(state[5], {
        about.name, last, about.pending + taken, redis.call('XLEN', again) - taken, alive,
        redis.call('XPENDING', KEYS[1], about.name)[2] or '', first(KEYS[1], '(' .. last), first(again, '-'),
    })
end
return state
"""

# KEYS: stream. ARGV: after which id to count, how many at most. Returns how many, and the last.
COUNT: Final = """
local found = redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '+', 'COUNT', ARGV[2])
return {#found, #found > 0 and found[#found][1] or ''}
"""

# KEYS: dead. ARGV: what the names of streams for one pool begin with, ids. Returns how many were there.
PUT_BACK: Final = """
local count = 0
for i = 2, #ARGV do
    local entry = redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i])[1]
    if entry then
        local again = ARGV[1] .. entry[2][8] .. entry[2][6]
        redis.call('XLEN', again)  -- fails if it is no stream
        redis.call('XDEL', KEYS[1], ARGV[i])
        redis.call('XADD', again, '*', 'tries', 0, 'body', entry[2][4])
        count = count + 1
    end
end
return count
"""
