#!lua flags=allow-oom
-- Repair what nobody else will. KEYS: lock, counters, active, workers, queues... ARGV: lock ms, worker silent ms.
-- Returns {counted jobs, jobs dropped because nothing is left of them, workers dropped, consumers dropped} or {}.
if not redis.call('SET', KEYS[1], 1, 'NX', 'PX', ARGV[1]) then
  return {}
end
local now = now_ms()
local sums, tenants, jobs, gone = { tokens = 0, encode = 0, decode = 0, bytes = 0 }, {}, 0, 0
local all = redis.call('HGETALL', KEYS[3])
for i = 1, #all, 2 do
  local cost, encode, decode, bytes, dies, tenant = string.match(all[i + 1], '^(%d+) (%d+) (%d+) (%d+) (%d+) (.*)$')
  if tonumber(dies) < now then
    redis.call('HDEL', KEYS[3], all[i])
    gone = gone + 1
  else
    jobs = jobs + 1
    sums.tokens = sums.tokens + cost
    sums.encode = sums.encode + encode
    sums.decode = sums.decode + decode
    sums.bytes = sums.bytes + bytes
    tenants[tenant] = (tenants[tenant] or 0) + cost
  end
end
redis.call('UNLINK', KEYS[2])
redis.call('HSET', KEYS[2], 'tokens', sums.tokens, 'encode', sums.encode, 'decode', sums.decode, 'bytes',
  sums.bytes, 'items', jobs)
for tenant, cost in pairs(tenants) do
  redis.call('HSET', KEYS[2], 't:' .. tenant, cost)
end
local silent = redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', ms(now - ARGV[2]))
local dropped = 0
for i = 5, #KEYS do
  local consumers = redis.pcall('XINFO', 'CONSUMERS', KEYS[i], 'w')
  for _, c in ipairs(consumers.err and {} or consumers) do -- {"name", n, "pending", p, ...}
    -- With pending entries its jobs would go with it.
    if c[4] == 0 and not redis.call('ZSCORE', KEYS[4], c[2]) then
      redis.call('XGROUP', 'DELCONSUMER', KEYS[i], 'w', c[2])
      dropped = dropped + 1
    end
  end
end
return { jobs, gone, silent, dropped }
