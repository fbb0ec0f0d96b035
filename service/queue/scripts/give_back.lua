#!lua flags=allow-oom
-- Put a job back that this worker will not run. ARGV: fence, worker, "1" to take the counted try back.
if not held(ARGV[1], ARGV[2]) then
  return 'lost'
end
local j = redis.call('HMGET', KEYS[1], 'cx', 'mid', 'id', 'api', 'b', 'sf')
if j[1] then
  return finish('canceled', '', '')
end
if ARGV[3] == '1' and j[6] == ARGV[1] then
  redis.call('HINCRBY', KEYS[1], 'n', -1)
end
redis.call('XACK', KEYS[2], 'w', j[2])
redis.call('XDEL', KEYS[2], j[2])
local mid = redis.call('XADD', KEYS[2], '*', 'id', j[3], 'api', j[4], 'b', j[5])
redis.call('HINCRBY', KEYS[1], 'f', 1)
redis.call('HSET', KEYS[1], 'st', 'queued', 'w', '', 'mid', mid)
return 'queued'
