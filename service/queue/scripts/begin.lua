#!lua flags=allow-oom
-- Take a job that XREADGROUP or XAUTOCLAIM delivered. ARGV: stream id, worker, most tries.
-- Returns {"run", fence, tries, op, options, request id, tenant, cost, deadline ms, enqueued ms} or {why}.
local j = redis.call('HMGET', KEYS[1], 'st', 'mid', 'cx', 'dl', 'n')
if not j[1] or not live(j[1]) or j[2] ~= ARGV[1] then -- forgotten, ended, or an entry from before a give-back
  redis.call('XACK', KEYS[2], 'w', ARGV[1])
  redis.call('XDEL', KEYS[2], ARGV[1])
  return { 'gone' }
end
if j[3] then
  return { finish('canceled', '', '') }
end
if now_ms() > tonumber(j[4]) then
  return { finish('expired', 'deadline_exceeded', 'the deadline passed in the queue') }
end
if tonumber(j[5]) >= tonumber(ARGV[3]) then
  local d = redis.call('HMGET', KEYS[1], 'id', 't', 'c', 'op', 'rid', 'w')
  redis.call('XADD', KEYS[6], 'MAXLEN', '~', 1000, '*', 'id', d[1], 't', d[2], 'c', d[3], 'op', d[4], 'rid', d[5], 'w',
    d[6], 'n', j[5])
  return { finish('failed', 'item_failed_repeatedly', 'the workers that ran this item did not come back, '
    .. j[5] .. ' times') }
end
local fence = redis.call('HINCRBY', KEYS[1], 'f', 1)
redis.call('HSET', KEYS[1], 'st', 'running', 'w', ARGV[2])
return { 'run', fence, tonumber(j[5]),
  unpack(redis.call('HMGET', KEYS[1], 'op', 'opt', 'rid', 't', 'c', 'dl', 'at')) }
