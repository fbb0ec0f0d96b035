#!lua flags=allow-oom
-- Directly before the forward: count the try, or leave the job out. ARGV: fence, worker. Returns "run" or why not.
if not held(ARGV[1], ARGV[2]) then
  return 'lost'
end
local j = redis.call('HMGET', KEYS[1], 'cx', 'dl', 'sf')
local now = now_ms()
if j[1] then
  return finish('canceled', '', '')
end
if now > tonumber(j[2]) then
  return finish('expired', 'deadline_exceeded', 'the deadline passed in the queue')
end
if j[3] ~= ARGV[1] then -- once a fence, however often the call is repeated
  redis.call('HINCRBY', KEYS[1], 'n', 1)
  redis.call('HSET', KEYS[1], 'sf', ARGV[1], 's', ms(now))
end
return 'run'
