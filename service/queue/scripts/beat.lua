#!lua flags=allow-oom
-- Say that a worker lives, make sure that the groups exist, keep its jobs.
-- KEYS: workers, worker, queue of lane 0, of lane 1, then job and queue of each lease.
-- ARGV: worker, ready, tokens per second of encode and of decode, card, then fence and
-- stream id of each lease. Returns the leases (1...) that are lost or whose jobs nobody waits for.
local now = now_ms()
redis.call('ZADD', KEYS[1], ms(now), ARGV[1])
redis.call('HSET', KEYS[2], 'ready', ARGV[2], 'encode', ARGV[3], 'decode', ARGV[4], 'card', ARGV[5])
redis.call('PEXPIRE', KEYS[2], 600000)
for i = 3, 4 do -- from id 0: what came before the group, or before it was lost, must be seen. An error: it exists
  redis.pcall('XGROUP', 'CREATE', KEYS[i], 'w', '0', 'MKSTREAM')
end
local unwanted = {}
for i = 1, (#KEYS - 4) / 2 do
  local job, queue, fence, mid = KEYS[2 * i + 3], KEYS[2 * i + 4], ARGV[2 * i + 4], ARGV[2 * i + 5]
  local j = redis.call('HMGET', job, 'st', 'f', 'w', 'cx', 'dl')
  local kept = j[1] == 'running' and j[2] == fence and j[3] == ARGV[1]
  if kept then -- one that nobody waits for, too: its commit ends it
    -- XCLAIM would also steal from a new owner, so only after the check.
    redis.call('XCLAIM', queue, 'w', ARGV[1], 0, mid, 'JUSTID')
  end
  if kept and now > tonumber(j[5]) then -- its asker has not said so: it may have died
    j[4] = redis.call('HSET', job, 'cx', 1)
  end
  if not kept or j[4] then
    unwanted[#unwanted + 1] = i
  end
end
return unwanted
